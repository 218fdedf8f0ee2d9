"""What all ranks and replicas of a server must have in common: the code of this package, artifact and settings.

On several nodes each process reads the packages and the artifact of its own node, and with vLLM's `--nnodes` or
`--headless` also makes a configuration of its own. Ranks that differ would compute different parts of a layer, or wait
for each other for ever; replicas that differ would answer differently.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed
import vllm_buddy_kernels
from vllm.distributed.parallel_state import get_world_group

import vllm_buddy
from vllm_buddy import __version__
from vllm_buddy.artifact import Artifact, load_artifact
from vllm_buddy.errors import ArtifactError, SettingsError
from vllm_buddy.serving.start.attached import served_of
from vllm_buddy.serving.start.settings import engine_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PACKAGE = "vllm_buddy"
_ARTIFACT = "artifact"


class Served(NamedTuple):
    """What one process serves.

    node: its name in the network. facts: what must be the same everywhere, by what it is a fact of.
    """

    node: str
    facts: dict[str, str]


def served(vllm_config: "VllmConfig", artifact: Artifact | ArtifactError) -> Served:
    """What this process serves. artifact: or why it cannot be read here."""
    settings, spec = engine_settings(vllm_config), vllm_config.speculative_config
    facts = {_PACKAGE: f"{__version__} ({_source_digest()})", _ARTIFACT: f"none ({artifact})"}
    if isinstance(artifact, Artifact):
        facts[_ARTIFACT] = f"'{artifact.config.name}' ({artifact.digest})"
    for name, value in settings.model_dump(mode="json", exclude={"artifact"}).items():  # a folder of this node
        facts[f"setting {name}"] = json.dumps(value)
    facts["speculator"] = "none"
    if spec is not None:
        name = spec.model if spec.method == "custom_class" else spec.method
        facts["speculator"] = f"{name} with {spec.num_speculative_tokens} drafts"
    return Served(platform.node(), facts)


@cache
def _source_digest() -> str:
    """A hash over the package's own code: checkouts keep their version between two releases."""
    digest = hashlib.sha256()
    for package in (vllm_buddy, vllm_buddy_kernels):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def refuse_differences(wanted: Served, found: Sequence[tuple[str, Served]]) -> None:
    """Refuse processes that do not serve what the server was configured for.

    found: each process by name, such as "rank 1".

    Raises:
        SettingsError: in one line, which processes differ, on which nodes, in what, and both values.
    """
    differing: dict[tuple[str, str], list[str]] = {}
    for name, one in found:
        if difference := _difference(wanted.facts, one.facts):
            differing.setdefault((one.node, difference), []).append(name)
    if differing:
        told = "; ".join(f"{', '.join(names)} on {node} has {what}" for (node, what), names in differing.items())
        raise SettingsError(
            f"the server was configured on {wanted.node}, but {told}. Install the same version of vllm-buddy on every "
            "node, give every node the same artifact, and start all with the same settings"
        )


def _difference(wanted: dict[str, str], found: dict[str, str]) -> str:
    names = list(wanted | found)
    if wanted[_PACKAGE] != found[_PACKAGE]:  # another version may have other settings
        names = [_PACKAGE, _ARTIFACT]
    return ", ".join(
        f"{name} {found.get(name)} instead of {wanted.get(name)}"
        for name in names
        if wanted.get(name) != found.get(name)
    )


def load_agreed_artifact(vllm_config: "VllmConfig") -> Artifact:
    """Load the artifact of this rank, and compare what it serves with all ranks. Every rank must call this.

    Raises:
        SettingsError: on every rank, if one of them differs from the configuration of the first or has no artifact.
    """
    settings = engine_settings(vllm_config)
    artifact: Artifact | ArtifactError
    try:
        artifact = load_artifact(settings.artifact_folder)
    except ArtifactError as error:  # told to the other ranks, which would wait
        artifact = error
    group = get_world_group()
    ours = (served_of(vllm_config.model_config), served(vllm_config, artifact))
    ranks: list[Any] = [None] * group.world_size
    with torch.device("cpu"):  # vLLM builds models with their device as the default device
        torch.distributed.all_gather_object(ranks, ours, group=group.cpu_group)
    configured = ranks[0][0]
    refuse_differences(configured, [(f"rank {rank}", found) for rank, (_, found) in enumerate(ranks)])
    assert isinstance(artifact, Artifact)  # else it differs from the configuration
    return artifact
