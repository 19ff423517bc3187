"""A self-expanding network finds its size on MNIST: width and depth by the natural expansion score.

    GRAPHGROW_DATA=... python examples/senn_mnist.py [--epochs 12] [--figure senn_mnist.png]

One hidden layer starts with ten units. After each epoch of natural gradient descent (Kronecker
factors, learning rate 0.1, damping 0.1, batches of 1024, weight decay 0.001) units and layers are
added as long as one raises the score more than τ = 1.007 times and by more than α of the squared
gradient at the outputs; candidates are searched on 1024 training images by gradient ascent and judged
on 1024 validation images. Then networks are trained on class-balanced subsets in the same way, width
only, to see how much they grow. GRAPHGROW_DATA is a directory with MNIST's four files.

The paper is Mitchell, Mundt and Kersting (2023), Self-Expanding Neural Networks, section 4.3. It
takes 10,000 candidates, considers growing every 10 epochs, and uses conjugate gradients.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from nonparametric_report import mnist
from torch import nn

import graphgrow as gg
from graphgrow.nn import Rational

START, BATCH, VALIDATION, SHARED = 10, 1024, 10_000, 1024
PAPER = {"hidden units at the end": "50 to 60", "validation accuracy": "> 97 %"}


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


@torch.no_grad()
def accuracy(model, data):
    images, labels = data
    return (model(images).argmax(1) == labels).float().mean().item()


class Run:
    """One network that is trained and grown, and what happened."""

    def __init__(self, train, validation, options, *, layers, alpha, tau, epochs):
        self.train, self.validation, self.most = train, validation, options.most
        self.draws = torch.Generator().manual_seed(options.seed)
        model = network(self.draws)
        score = gg.scores.Senn(
            layers=layers,
            candidates=options.candidates,
            search=gg.scores.Ascent(options.steps),
            tau=tau,
            alpha=alpha,
            layer_size=60.0,
            damping=options.damping,
        )
        self.grower = gg.Grower(
            model,
            train[0][:2],
            loss=F.cross_entropy,
            optimizer=gg.KroneckerGradient(model.parameters(), 0.1, 0.1, weight_decay=1e-3, metric="loss"),
            score=score,
            where=gg.Where(per=None, places=2),
        )
        self.history, self.growths = [], []
        self.look = [tuple(t[:SHARED] for t in train), tuple(t[:SHARED] for t in validation)]
        for epoch in range(epochs):
            self.epoch()
            self.note(epoch + 1)
            if epoch + 1 < epochs:
                self.grow(epoch + 1)

    def epoch(self):
        """Train for one epoch; a subset smaller than a batch is one batch."""
        images, labels = self.train
        for batch in torch.randperm(len(images), generator=self.draws).split(BATCH):

            def closure(batch=batch):
                outputs = self.grower.model(images[batch])
                return F.cross_entropy(outputs, labels[batch]), outputs

            self.grower.optimizer.step(closure)

    def grow(self, epoch):
        """Add what passes, one after the other, and note that the accuracy stays."""
        for _ in range(self.most):
            before = accuracy(self.grower.model, self.validation)
            event = self.grower.step(self.look)
            if event is None:
                return
            after = accuracy(self.grower.model, self.validation)
            self.growths.append((epoch, event["growths"], before, after))

    def note(self, epoch):
        model = self.grower.model
        self.history.append((epoch, self.units, accuracy(model, self.validation)))

    @property
    def units(self):
        """All hidden units."""
        return sum(m.out_features for m in self.grower.model.modules() if isinstance(m, nn.Linear)) - 10


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
