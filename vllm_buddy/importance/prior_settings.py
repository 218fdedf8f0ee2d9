"""The settings of `vllm-buddy prior`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from vllm_buddy.artifact.provenance import command_line
from vllm_buddy.models.find import MODEL_HELP
from vllm_buddy.models.torch_device import DEVICE_HELP, Dtype


class PriorSettings(BaseModel):
    """The settings of one measurement, from which the command's options and the record in run.yaml are generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_dir: Path = Field(description=MODEL_HELP)
    out: Path = Field(description="folder to write the artifact to; new or empty")
    text: Path = Field(description="calibration text, UTF-8")
    indicator: str = Field(default="taylor", description="measure of importance: taylor, delta_ppl or cosine")
    name: str | None = Field(default=None, description="name of the artifact (absent: the name of the folder)")
    base_model_id: str | None = Field(default=None, description="hub id of the model (absent: the folder's name)")
    tokens: int = Field(default=4096, ge=1, description="tokens to measure on, from the start of the text")
    window: int = Field(default=512, ge=2, description="tokens per window")
    library: int = Field(default=0, ge=0, description="paths per depth in the path library; 0 writes none")
    heldout: int = Field(
        default=0, ge=0, description="tokens after the calibration part on which perplexity by budget is measured"
    )
    compare: bool = Field(
        default=False, description="also measure the other indicators, for the table in the model card"
    )
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: Dtype = Field(default="float32", description="dtype of the model: bfloat16 or float32")

    def command(self) -> str:
        """Return the command line that makes the same artifact again."""
        return command_line("prior", self, positional=("model_dir", "out"))
