"""Draws softpick.png: python docs/softpick/plot_softpick.py (needs the extra [dev])."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fla.ops.attn.softpick import softpick

COLORS = {"softmax": "#999999", "softpick": "#c0392b"}


def main() -> None:
    torch.manual_seed(3)
    # one query: an uninformative first key, three keys that match, the rest at random below zero
    scores = -1.0 + 0.8 * torch.randn(24)
    scores[[6, 13, 20]] = torch.tensor([2.5, 1.2, 3.2])
    weights = {"softmax": scores.softmax(0), "softpick": softpick(scores)}

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 1.9])

    s = torch.linspace(-4, 1.5, 300)
    left.plot(s, s.exp(), color=COLORS["softmax"], label="softmax  $e^s$")
    left.plot(s, s.expm1().relu(), color=COLORS["softpick"], label="softpick  relu$(e^s - 1)$")
    left.plot(
        s, s.expm1().abs(), color=COLORS["softpick"], ls=":", label="its denominator  $|e^s - 1|$"
    )
    left.set(xlabel="score $s$", ylabel="before dividing by the sum", ylim=(-0.1, 3.6))
    left.legend(frameon=False, fontsize=9, loc="upper left")

    for i, (name, w) in enumerate(weights.items()):
        zeros = int((w == 0).sum())
        label = f"{name}: {zeros} of {len(w)} weights are 0"
        right.bar(
            torch.arange(len(w)) + 0.4 * i - 0.2, w, width=0.4, color=COLORS[name], label=label
        )
    right.set(xlabel="key", ylabel="weight")
    right.legend(frameon=False, fontsize=10, loc="upper left")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("softpick.png"), dpi=150)


if __name__ == "__main__":
    main()
