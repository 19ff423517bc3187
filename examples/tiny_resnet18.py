"""ResNet-18 grows from 1/64 or 1/4 of its width on CIFAR-100: TINY's table 1.

    GRAPHGROW_DATA=... python examples/tiny_resnet18.py runs/tiny [--method tiny] [--part 64]
        [--every 1] [--extra 250] [--minutes 9] [--figure resnet18.png]
    python examples/tiny_resnet18.py runs/smoke --smoke

The middles of the eight blocks grow in turn, by 3, 3, 6, 6, 12, 12, 24 and 24 units (table 2), with
`--every` epochs of training between: 21 rounds from 1/64, 16 from 1/4, then `--extra` epochs. SGD
with rate 0.01; batches of 32 images at first, growing with the root of the number of parameters
(D.2). New units have incoming and outgoing weights of mean square 0.001 (D.3.1); GradMax's have no
incoming ones and outgoing ones of norm 0.001. Moments are taken on (9 · width)²/pixels images
(D.1), here no fewer than 1000 and no more than 10,000.

A run goes on where it stopped: after `--minutes` it writes its folder and ends, and the same
command continues it. It takes a GPU where there is one. What the paper does not say is chosen:
batch norms, crops and flips, a constant rate, and an activation with slope one at zero.

Numbers of a full run on a GPU are missing: none was at hand. `--smoke` runs a narrow network on
random images in two pieces and takes 10 seconds on one core.

Source: Verbockhaven, Rudkiewicz, Chevallier, Charpiat (2024), Growing Tiny Networks, section 5.1
and appendices D and E.
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar100 import TEST, TRAIN, cifar100
from tiny_resnet18_model import Net, axes, crops

import graphgrow as gg

PAPER = {  # accuracy after growth and after more epochs, by part, epochs between and method
    (4, 0.25): {"tiny": (67.0, 70.0), "gradmax": (65.0, 67.0)},
    (4, 1.0): {"tiny": (71.0, 71.0), "gradmax": (69.0, 69.0)},
    (64, 0.25): {"tiny": (66.0, 69.0), "gradmax": (45.0, 57.0)},
    (64, 1.0): {"tiny": (68.0, 69.0), "gradmax": (57.0, 59.0)},
}
SCRATCH, RATE, BATCH, SIZE = 72.9, 1e-2, 32, 1e-3
SMOKE = {"base": 4, "part": 4, "every": 0.5, "extra": 1.0, "images": 96}


class Due:
    """Grow when told to."""

    now = False

    def due(self, clock):
        """Return whether it was told to."""
        return self.now


class Run:
    """One run: the Grower with model and optimizer, how many images were seen, what came of it."""

    def __init__(self, options, data, device):
        self.options, self.device, self.order = options, device, (-1, torch.empty(0))
        (self.x, self.y), self.test = data
        self.seen, self.turns, self.seconds, self.curve = 0, 0, 0.0, []
        kept = options.folder / "rest.pt"
        rest = torch.load(kept) if kept.exists() else None
        torch.manual_seed(options.seed)
        part = 1 if options.method == "scratch" else options.part
        model, example = Net(options.base, part), self.x[:2].cpu()
        self.first = sum(p.numel() for p in model.parameters())
        if rest is not None:
            model = gg.load(options.folder / "model", model, example)
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        final = axes(options.base)
        start = {name: max(width // part, 1) for name, width in final.items()}
        first = options.base - start["stages.0.1.first"]
        self.rounds = first // 3 if options.method != "scratch" else 0
        quota = tuple((name, (final[name] - start[name]) // max(self.rounds, 1)) for name in final)
        tiny = options.method == "tiny"
        self.grower = gg.Grower(
            model, example.to(device), loss=F.cross_entropy, optimizer=optimizer, when=Due(),
            score=gg.scores.Tiny() if tiny else gg.scores.GradMax(norm=SIZE),
            where=gg.Where(tuple(final), per=None, least=-math.inf, most=tuple(final.items()),
                           turns=True),
            many=gg.Quota(quota), amplitude=SIZE if tiny else False,
        )  # fmt: skip
        if rest is not None:
            optimizer.load_state_dict(rest["optimizer"])
            self.grower.resume(rest["grower"])
            vars(self).update(rest["run"])

    def save(self):
        """Write all that is needed to go on."""
        self.options.folder.mkdir(parents=True, exist_ok=True)
        gg.save(self.options.folder / "model", self.grower.model, journal=self.grower.journal)
        run = {name: getattr(self, name) for name in ("seen", "turns", "seconds", "curve")}
        rest = {"optimizer": self.grower.optimizer.state_dict(), "grower": self.grower.state()}
        torch.save({**rest, "run": run}, self.options.folder / "rest.pt")

    def go_on(self, deadline):
        """Train and grow until the end or the deadline and return whether it is the end."""
        began, epoch = time.perf_counter(), len(self.x)
        every, turns = self.options.every * epoch, self.rounds * len(axes(self.options.base))
        end = turns * every + self.options.extra * epoch
        while self.seen < end and (self.seen == 0 or time.perf_counter() < deadline):
            if self.turns < turns and self.seen >= self.turns * every:
                self.grow()
            before = self.seen // epoch
            self.train()
            if self.seen // epoch > before:
                self.note("epoch")
        self.seconds += time.perf_counter() - began
        self.save()
        return self.seen >= end

    def grow(self):
        """Let the next axis grow."""
        self.note("growth")
        axis = list(axes(self.options.base))[self.turns % 8]
        stage = int(axis.split(".")[1])
        pixels = (self.x.shape[-1] // 2**stage) ** 2
        count = (9 * self.options.base * 2**stage) ** 2 // pixels
        drawn = torch.Generator().manual_seed(self.turns)
        chosen = torch.randperm(len(self.x), generator=drawn)[: min(max(count, 1000), 10_000)]
        self.grower.when.now = True
        self.grower.step([(self.x[part], self.y[part]) for part in chosen.split(500)])
        self.grower.when.now = False
        self.turns += 1

    def train(self):
        """Take one step; the size of the batch follows the number of parameters."""
        parameters = sum(p.numel() for p in self.grower.model.parameters())
        size = round(BATCH * (parameters / self.first) ** 0.5)
        number, at = divmod(self.seen, len(self.x))
        if self.order[0] != number:
            drawn = torch.Generator().manual_seed(number)
            self.order = number, torch.randperm(len(self.x), generator=drawn)
        chosen = self.order[1][at : at + size]
        images = crops(self.x[chosen], torch.Generator().manual_seed(self.seen))
        self.grower.optimizer.zero_grad()
        loss = F.cross_entropy(self.grower.model.train()(images), self.y[chosen])
        loss.backward()
        self.grower.optimizer.step()
        self.seen += len(chosen)
        self.grower.step([(self.x[:500], self.y[:500])])

    @torch.no_grad()
    def note(self, why):
        """Keep the accuracy on test images, with parameters and images seen."""
        model, (x, y) = self.grower.model.eval(), self.test
        right = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
        parameters = sum(p.numel() for p in model.parameters())
        self.curve.append((why, self.turns, self.seen / len(self.x), parameters, right / len(y)))
        _, turns, epochs, _, accuracy = self.curve[-1]
        size = f"{parameters / 1e6:.2f}M parameters"
        print(f"{why:6} {turns:3} turns, {epochs:7.2f} epochs, {size}, {accuracy:.1%}", flush=True)


def loaded(options, device):
    """Return training and test images on the device, None where there are none."""
    if options.smoke:
        torch.manual_seed(0)
        x, y = torch.randn(2 * options.images, 3, 16, 16), torch.randint(100, (2 * options.images,))
        return [(a.to(device), b.to(device)) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
    parts = [cifar100(names) for names in (TRAIN, TEST)]
    if None in parts:
        return None
    (x, y), test = parts
    cut = (x[: options.images], y[: options.images])
    return [tuple(t.to(device) for t in pair) for pair in (cut, test)]


def save_figure(run, path):
    """Draw the accuracy by number of parameters while growing, and by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    grown = [entry for entry in run.curve if entry[0] == "growth"]
    left.plot([e[3] for e in grown], [e[4] for e in grown])
    right.plot([e[2] for e in run.curve], [e[4] for e in run.curve])
    left.set(xlabel="parameters", ylabel="test accuracy")
    right.set(xlabel="epochs")
    plt.tight_layout()
    plt.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the run is kept between pieces")
    parser.add_argument("--method", choices=("tiny", "gradmax", "scratch"), default="tiny")
    parser.add_argument("--part", type=int, default=64, help="64 or 4: the start's share of widths")
    parser.add_argument("--every", type=float, default=1.0, help="epochs between growths")
    parser.add_argument("--extra", type=float, default=250.0, help="epochs after the last one")
    parser.add_argument("--base", type=int, default=64, help="width of the first stage")
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long a piece takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="random images, a narrow network")
    parser.add_argument("--figure", help="where to draw")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.perf_counter() + 60 * options.minutes
    torch.backends.cudnn.allow_tf32 = False  # losses before and after growth are compared
    if options.smoke:
        vars(options).update(SMOKE)
        shutil.rmtree(options.folder, ignore_errors=True)
    data = loaded(options, device)
    if data is None:
        return
    run = Run(options, data, device)
    if options.smoke:  # a first piece of one step, as if time were up
        assert not run.go_on(0.0)
        run = Run(options, data, device)
        assert run.seen > 0 and run.turns == 1
    done = run.go_on(deadline)
    for event in run.grower.record:
        assert abs(event["loss_after"] - event["loss_before"]) < 1e-3, event
    if options.figure:
        save_figure(run, options.figure)
    if not done:
        print("to be continued: the same command goes on")
        return
    run.note("end")
    grown = [entry for entry in run.curve if entry[2] <= run.turns * options.every][-1]
    paper = PAPER.get((options.part, options.every), {}).get(options.method, ("-", "-"))
    print(f"{options.method}, 1/{options.part}: after growth {grown[4]:.1%}, at the end "
          f"{run.curve[-1][4]:.1%}, {run.seconds / 60:.0f} minutes on {device}; "
          f"paper {paper[0]} and {paper[1]} %, from scratch {SCRATCH} %")  # fmt: skip
    widths = {name: run.grower.graph.axis(name).width for name in axes(options.base)}
    assert widths == axes(options.base), widths


if __name__ == "__main__":
    main()
