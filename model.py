"""The networks, and one class per way of training them (a loss on the logits of a minibatch).

Symbols: Φ(x) is the logit, w = 1 the frozen output layer behind it, e an environment, R_e its risk
(mean binary cross entropy), y the label, z the colour, σ the logistic function.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch
from preprocessing import Amount, DropRate, number


class Network(nn.Module):
    """Normalised images (N, channels · 784) → logits (N,): layers `phi`, then the frozen w = 1."""

    defaults = {}  # of the command line's arguments, in place of what the signatures say

    def __init__(self, phi: nn.Sequential):
        super().__init__()
        self.phi = phi
        # A bare scalar, no nn.Linear: MemTorch would turn a 1 x 1 layer into a crossbar of its own.
        self.output_layer = nn.Parameter(torch.ones(()), requires_grad=False)
        for layer in phi:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)  # Glorot's, as Arjovsky et al. 2019 have it
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.output_layer * self.phi(images).squeeze(-1)


class MLP(Network):
    """The assignment's network: fully connected layers with ReLU, one logit.

    Without blue (see `dataset.Digits`), weights start from Glorot's bound for 1568 inputs, 22 %
    wider than the assignment's for 2352. Those of red and green start the same, so that untrained
    it decides alike in both: prior knowledge, which the assignment's lacks. The logit's start equal
    in size, half negative. If both were drawn, few units might answer to a label in one colour.

    Args:
        hidden_dim: units of each hidden layer (MLP)
        bias: give the layers biases (MLP)
        drop_rate: proportion of hidden units dropped while training, 0 to 0.99
    """

    def __init__(
        self,
        channels: int = 2,
        hidden_dim: Annotated[tuple[int, ...], number(int, 1)] = (64, 16),
        bias: bool = False,
        drop_rate: DropRate = 0.0,
    ):
        layers, inputs = [], channels * 784
        for width in hidden_dim:
            layers += [nn.Linear(inputs, width, bias), nn.ReLU()]
            layers += [nn.Dropout(drop_rate)] if drop_rate else []
            inputs = width
        super().__init__(nn.Sequential(*layers, nn.Linear(inputs, 1, bias)))
        from_colors, to_logit = (self.phi[index].weight.detach() for index in (0, -1))
        from_colors.copy_(from_colors[:, :784].repeat(1, channels))
        to_logit.fill_((2 / (inputs + 1)) ** 0.5)  # the standard deviation of Glorot's draw
        to_logit[:, 1::2] *= -1


class Loss:
    """What one training minimises: `loss(logits, batch)`, logits (N,), a scalar; may keep state."""

    defaults = {}  # of the command line's arguments, in place of what the signatures say
    environments = 2

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross entropy of each sample, (N,)."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")

    def means(self, values: Tensor, batch: Batch) -> Tensor:
        """Mean of `values` (N,) over each environment's samples, (E,); 0 where a batch has none."""
        members = F.one_hot(batch.envs, self.environments).to(values.dtype)
        return values @ members / members.sum(0).clamp(min=1)

    def risks(self, logits: Tensor, batch: Batch) -> Tensor:
        """R_e, (E,)."""
        return self.means(self.losses(logits, batch), batch)


class ERM(Loss):
    """Empirical risk minimisation: mean over e of R_e (assignment, equations 2 and 3)."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.risks(logits, batch).mean()


class GroupDRO(Loss):
    """Group distributionally robust optimisation (after Sagawa et al. 2019, Algorithm 1).

    q starts uniform. In each step q_e ← q_e exp(η R_e), renormalised; then Σ q_e R_e, q constant.

    Args:
        eta: step size η of groupDRO's weights q
    """

    def __init__(self, eta: Amount = 0.05):
        self.eta = eta
        self.log_q = torch.zeros(self.environments)  # exp(η R_e) can overflow, its logarithm can't

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        risks = self.risks(logits, batch)
        self.log_q = (self.log_q.to(risks.device) + self.eta * risks.detach()).log_softmax(-1)
        return (self.log_q.softmax(-1) * risks).sum()


class IRM(Loss):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al. 2019; assignment, equation 4).

    Mean over e of R_e + λ · mean over e of G_e², where G_e = ∂R_e(w · Φ)/∂w at w = 1 is the
    environment's mean of (σ(Φ) - y) Φ, the same as torch.autograd.grad by `output_layer`.

    Args:
        reg_lambda: weight λ of IRM's penalty
    """

    def __init__(self, reg_lambda: Amount = 50.0):
        self.reg_lambda = reg_lambda

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        slopes = self.means((torch.sigmoid(logits) - batch.labels) * logits, batch)
        return self.risks(logits, batch).mean() + self.reg_lambda * slopes.square().mean()


class Backdoor(Loss):
    """Backdoor adjustment for colour and environment, the stratum s (Pearl 2009, theorem 3.3.2).

    P(y | do(x)) = Σ_s P(y | x, s) P(s). Where the digit says nothing about s once the label is
    known, the log odds of P(y = 1 | x, s) are Φ(x) + o_s, o_s = log P(y = 1 | s) / P(y = 0 | s), by
    Bayes' rule (prior correction, King & Zeng 2001). That is what is fitted; `probability` sums.

    Args:
        adjustment: Backdoor's. "offset" fits σ(Φ + o_s) by maximum likelihood. "weights" makes each
            sample count 1 / P(y | s), which is P(x | do(y)) = Σ_s P(x | y, s) P(s) (causal
            bootstrapping, Little & Badawy 2019); σ(Φ) is then the posterior for balanced labels
    """

    defaults = {"iteration": 800, "weight_decay": 1e-3}  # longer: a weight sees one colour

    def __init__(self, adjustment: Literal["offset", "weights"] = "offset"):
        self.adjustment = adjustment
        # Of the samples seen so far, (S, 2): stratum 2 e + z, label. The half leaves odds finite.
        self.counts = torch.full((2 * self.environments, 2), 0.5)

    @property
    def offsets(self) -> Tensor:
        """o_s, (S,)."""
        return self.counts[:, 1].log() - self.counts[:, 0].log()

    def probability(self, logits: Tensor) -> Tensor:
        """Logits Φ(x) of any shape → P(y = 1 | do(x)) = Σ_s P(s) σ(Φ(x) + o_s), of that shape."""
        p_s = self.counts.sum(1) / self.counts.sum()
        given_s = torch.sigmoid(logits.unsqueeze(-1) + self.offsets.to(logits.device))
        return (given_s * p_s.to(logits.device)).sum(-1)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        strata, labels = 2 * batch.envs + batch.colors, batch.labels.long()
        seen = F.one_hot(2 * strata + labels, self.counts.numel()).sum(0).view_as(self.counts)
        self.counts = self.counts.to(logits.device) + seen
        if self.adjustment == "offset":
            return self.losses(logits + self.offsets[strata], batch).mean()
        p_y = self.counts / self.counts.sum(1, keepdim=True)
        return (self.losses(logits, batch) / p_y[strata, labels]).mean() / 2  # their mean is 2


class CNN(Network):
    """The course project's network: two convolutions with pooling, 64 hidden units, one logit.

    Args:
        drop_rate: proportion of hidden units dropped while training, 0 to 0.99
    """

    defaults = {"batch_size": 384, "iteration": 800, "weight_decay": 0.0}

    def __init__(self, channels: int = 2, drop_rate: DropRate = 0.0):
        # Pooling before ReLU gives the same numbers, and ReLU a quarter of the work.
        layers = [nn.Unflatten(1, (channels, 28, 28)), nn.Conv2d(channels, 32, 5), nn.MaxPool2d(2)]
        layers += [nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(64, 1)]
        super().__init__(nn.Sequential(*layers))
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU
