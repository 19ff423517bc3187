"""A self-expanding network finds its size on MNIST: width by the natural expansion score.

    GRAPHGROW_DATA=... python examples/senn_mnist.py [--epochs 16] [--figure senn_mnist.png]

One hidden layer starts with ten units and is trained by natural gradient descent with Kronecker
factors and the Fisher matrix of the predicted classes: damping 0.003, batches of 1024, weight decay
0.05, steps of length 0.5 at most, a learning rate of 0.3 that falls to 0 in the last third. After
each epoch of the first two thirds units are added, six at most, as long as one raises the score
more than τ = 1.007 times and by more than α of the squared gradient at the outputs. Candidates are
searched on 8192 training images by gradient ascent, the best of them is chosen on 8192 others and
judged on n = 20,000 more, where a unit of no use explains 1/n of the gradient by chance: α is 14/n.
Then networks are trained on class-balanced subsets in the same way, for as many steps, candidates
searched, chosen and judged on a third each where that is less. GRAPHGROW_DATA is a directory with
MNIST's four files.

The paper is Mitchell, Mundt and Kersting (2023), Self-Expanding Neural Networks, section 4.3. It
has 10,000 candidates for a place, searched and chosen on 1024 images, looks every 10 epochs, takes
conjugate gradients with the euclidean metric at a learning rate and a damping of 0.1, and runs for
up to a day on a GPU. Here most of what fits 1024 images best fits them alone. Its networks get a
second layer at the first look; here a layer, which counts as 60 units, is worth less than a unit
then, and `--layers` tries layers, too. Accuracies are on the 10,000 test images.

Measured: 54 units and 97.9 % after 928 steps, no drop at any of 44 growths; 24 units from 20,000
images, 10 from 600; 340 s of one core of a busy machine. α sets the size: 20/n ends at 43 units and
97.6 %, 10/n at 68 and 97.8 %; smaller subsets have a larger α, as they have a smaller n.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from nonparametric_report import mnist
from torch import nn

import graphgrow as gg
from graphgrow.nn import Rational

START, BATCH = 10, 1024
LOOK = 8192, 8192, 20_000  # images that candidates are searched, chosen and judged on
RATE, DAMPING, DECAY, RADIUS, TAU = 0.3, 3e-3, 0.05, 0.5, 1.007


def network(generator):
    """Return 784-10-10 with a rational activation, weights as in LeCun et al., the rest normal."""
    model = nn.Sequential(nn.Linear(784, START), Rational(START), nn.Linear(START, 10))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        for parameter in model[1].parameters():
            parameter.normal_(generator=generator)
    return model


class Run:
    """One network that is trained and grown, and what happened."""

    def __init__(self, train, validation, options):
        self.train, self.validation, self.options = train, validation, options
        self.draws = torch.Generator().manual_seed(options.seed)
        model = network(self.draws)
        third = len(train[0]) // 3
        parts = [slice(k * third, k * third + min(size, third)) for k, size in enumerate(LOOK)]
        self.look = [tuple(t[part] for t in train) for part in parts]
        score = gg.scores.Senn(
            layers=options.layers,
            candidates=options.candidates,
            search=gg.scores.Ascent(options.moves),
            tau=TAU,
            alpha=14 / len(self.look[-1][0]),
            layer_size=60.0,
        )
        optimizer = gg.KroneckerGradient(
            model.parameters(), RATE, DAMPING, weight_decay=DECAY, metric="loss", radius=RADIUS
        )
        self.grower = gg.Grower(
            model,
            train[0][:2],
            loss=F.cross_entropy,
            optimizer=optimizer,
            score=score,
            where=gg.Where(per=None),
        )
        self.history, self.growths, self.steps = [], [], 0

    def run(self, epochs, size):
        """Train for so many epochs of `size` images, however few there are, and grow between."""
        total, each = epochs * (size // BATCH), size // BATCH
        while self.steps < total:
            self.step(total)
            if self.steps % each == 0:
                self.history.append((self.steps, self.units, self.accuracy()))
                print(
                    f"  step {self.steps}: units {self.units}, accuracy {self.history[-1][2]:.4f}"
                )
                if self.steps <= 2 * total / 3:
                    self.grow()
        return self

    def step(self, total):
        """Take one step on a batch of images, drawn without repetition."""
        images, labels = self.train
        batch = torch.randperm(len(images), generator=self.draws)[:BATCH]

        def closure():
            outputs = self.grower.model(images[batch])
            return F.cross_entropy(outputs, labels[batch]), outputs

        for group in self.grower.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 3 * (1 - self.steps / total))
        self.grower.optimizer.step(closure)
        self.steps += 1

    def grow(self):
        """Add units or layers, one after the other, and note that the accuracy stays."""
        for _ in range(self.options.most):
            before, event = self.accuracy(), self.grower.step(self.look)
            if event is None:
                break
            self.growths.append((self.steps, event["growths"][0], before, self.accuracy()))

    @torch.no_grad()
    def accuracy(self):
        """Return the share of validation images that are classified rightly."""
        images, labels = self.validation
        return (self.grower.model(images).argmax(1) == labels).double().mean().item()

    @property
    def units(self):
        """All hidden units, by layer."""
        layers = [m for m in self.grower.model.modules() if isinstance(m, nn.Linear)]
        return tuple(layer.out_features for layer in layers[:-1])


def balanced(data, count, seed):
    """Return a subset with equally many images of each class."""
    images, labels = data
    draws = torch.Generator().manual_seed(seed)
    each = [
        (labels == k).nonzero().flatten()[torch.randperm(int((labels == k).sum()), generator=draws)]
        for k in range(10)
    ]
    chosen = torch.cat([places[: count // 10] for places in each])
    chosen = chosen[torch.randperm(len(chosen), generator=draws)]
    return images[chosen], labels[chosen]


def report(run, subsets, seconds):
    """Print what came out beside what the paper says."""
    drop = max((before - after for _, _, before, after in run.growths), default=0.0)
    layers = [step for step, growth, _, _ in run.growths if growth["rewrite"] == "Deepen"]
    rows = [
        ("hidden units at the end", "50 to 60", f"{sum(run.units)} in layers of {run.units}"),
        ("validation accuracy at the end", "> 97 %", f"{100 * run.history[-1][2]:.2f} %"),
        ("growth events", "", f"{len(run.growths)}, of these {len(layers)} layers at {layers}"),
        ("largest drop at one", "none", f"{100 * drop:.2f} %"),
    ]
    for count, found in subsets:
        said = "10: the initial size" if count < 5000 else "grows with the subset"
        rows.append((f"units from {count} images", said, str(sum(found.units))))
    print(f"{'':<34}{'paper':<24}here")
    for row in rows:
        print(f"{row[0]:<34}{row[1]:<24}{row[2]}")
    print(f"{seconds:.0f} s of processor time")


def save_figure(run, subsets, path):
    """Draw the panels of figure 4: size and accuracy by step, size by subset."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"cannot draw '{path}': matplotlib is not installed")
        return
    figure, (sizes, right, by_subset) = plt.subplots(1, 3, figsize=(15, 4.5))
    steps, units, accuracies = zip(*run.history, strict=True)
    sizes.step(steps, [sum(u) for u in units], where="post")
    sizes.set(title="hidden units", xlabel="batches")
    right.plot(steps, accuracies)
    right.set(title="validation accuracy", xlabel="batches")
    for step in sorted({step for step, _, _, _ in run.growths}):
        right.axvline(step, color="gray", lw=0.3)
    if subsets:
        by_subset.semilogx(
            [count for count, _ in subsets], [sum(found.units) for _, found in subsets], "o-"
        )
        by_subset.set(title="hidden units at the end", xlabel="images")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--images", type=int, default=60_000, help="to train on")
    parser.add_argument("--subsets", type=int, nargs="*", default=[600, 20_000])
    parser.add_argument("--layers", action="store_true", help="try layers, too")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--moves", type=int, default=50, help="steps of ascent")
    parser.add_argument("--most", type=int, default=6, help="units added at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="where to draw the panels of figure 4")
    options = parser.parse_args()
    data = mnist(standardise=False)
    if data is None:
        return
    (images, labels), validation = data
    train = images[: options.images], labels[: options.images]
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    began = time.process_time()
    run = Run(train, validation, options)
    run.run(options.epochs, options.images)
    subsets = []
    for count in options.subsets:
        found = Run(balanced(train, count, options.seed), validation, options)
        subsets.append((count, found.run(options.epochs, options.images)))
    subsets.append((options.images, run))
    report(run, subsets, time.process_time() - began)
    if options.figure:
        save_figure(run, subsets, options.figure)
    for _, growth, before, after in run.growths:
        assert abs(after - before) <= 2e-4, "growing must not change what images are taken for"
        assert abs(growth["loss_after"] - growth["loss_before"]) < 1e-4
    if options.epochs >= 16 and options.images == 60_000:
        sizes = [sum(found.units) for _, found in subsets]
        assert run.history[-1][2] > 0.97
        assert sizes == sorted(sizes) and START < sizes[-1] <= 60, sizes


if __name__ == "__main__":
    main()
