"""Draws the picture of `vllm-buddy depth-profile`."""

from pathlib import Path

from vllm_buddy.evaluation.depth_profile import Profile
from vllm_buddy.evaluation.plot import check_plotting, save_canvas


def plot_profile(profile: Profile, out: Path) -> None:
    """Draw right chains by depth, the earliest agreeing depth, and the speed-up that is predicted from them.

    Raises:
        EvaluationError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(14.5, 3.9), layout="constrained")
    chains, ead, speed = canvas.subplots(1, 3)
    drafted = profile.depths[:-1]
    for length in range(len(drafted[0]["right"])):
        points = [(row["depth"], row["right"][length]) for row in drafted]
        chains.plot(*zip(*points), "o-", markersize=4, label=f"chain of {length + 1}")
    chains.set(title="drafts that are all right", xlabel="layers of a draft", ylabel="share of positions", ylim=(0, 1))
    ead.bar([str(row["depth"]) for row in profile.depths], [row["ead"] for row in profile.depths], color="C7")
    ead.set(title="earliest agreeing depth", xlabel="layers", ylabel="share of tokens")
    for number, batch in enumerate(dict.fromkeys(row["batch"] for row in profile.speedups)):
        for source, style in (("depth", "o--"), ("n-gram, then depth", "s-")):
            rows = [row for row in profile.speedups if (row["batch"], row["source"]) == (batch, source)]
            label = f"{source}, batch {batch}"
            speed.plot(
                [row["depth"] for row in rows], [row["speedup"] for row in rows], style, color=f"C{number}", label=label
            )
    speed.axhline(1.0, color="black", linewidth=1, linestyle=":")
    speed.set(title="predicted speed-up, lossless", xlabel="layers of a draft", ylabel="over no drafts")
    chains.legend(frameon=False, fontsize="small")
    speed.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (chains, speed):
        axis.grid(alpha=0.3)
    save_canvas(canvas, out)
