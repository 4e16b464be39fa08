"""Draw L(y_s) and the chosen target of three kinds of posts through a run on the club world.

python train.py --log-choices && python -m docs.images.choices        # pip install matplotlib
"""

from pathlib import Path

from matplotlib.figure import Figure

from evaluate import read_jsonl

KINDS = {
    "D": "easy: the text contains the keyphrase",
    "B": "two facts: whose shirt, and which city",
    "E": "hopeless: a random mood",
}
TARGETS = {True: ("C2", "trained on y_c, which reasons"), False: ("C0", "trained on y_s")}


def main():
    out = Path("out")
    kinds = {post["id"]: post["kind"] for _, _, post in read_jsonl(out / "clubworld-0/train.jsonl")}
    choices = [choice for _, _, choice in read_jsonl(out / "run/choices.jsonl")]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for place, (kind, title) in enumerate(KINDS.items(), start=1):
        axes = figure.add_subplot(1, 3, place)
        for use_cot, (colour, label) in TARGETS.items():
            chosen = [choice for choice in choices if choice["use_cot"] == use_cot]
            chosen = [choice for choice in chosen if kinds[choice["id"]] == kind]
            points = [[choice[name] for choice in chosen] for name in ("step", "plain_loss")]
            axes.plot(*points, ".", color=colour, markersize=2, label=label)
        axes.axhline(0.4, color="black", linestyle="--", label="gamma")
        axes.set(yscale="log", ylim=(1e-3, 20), xlabel="step", title=title)
    figure.axes[0].set_ylabel("L(y_s) of a sample")
    figure.axes[2].legend(markerscale=5, loc="lower left")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
