"""The losses against independent computations of their formulas, and the networks."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batch
from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO, Loss, Network

ALL = (ERM, GroupDRO, IRM, Backdoor, lambda: Backdoor("weights"))


def random_batch(seed, size=96, environments=(0, 1)):
    g = torch.Generator().manual_seed(seed)

    def bits():
        return torch.randint(2, (size,), generator=g)

    images = torch.randn(size, 2, 28, 28, generator=g)
    envs = torch.tensor(environments)[torch.randint(len(environments), (size,), generator=g)]
    return Batch(images, bits().float(), bits(), envs)


class Given(nn.Module):
    """What a loss needs of a network, with the logits of the batch given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.output_layer = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.output_layer * self.logits


def given(seed, size=96):
    return Given(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def environment_risks(logits, batch):
    """R_0 and R_1: the mean of -log P(y) over an environment's samples."""
    p = torch.sigmoid(logits)
    losses = -(batch.labels * p.log() + (1 - batch.labels) * (1 - p).log())
    return [losses[batch.envs == e].mean() for e in (0, 1)]


def assert_same_gradients(objective, expected, parameters, **tolerance):
    ours = torch.autograd.grad(objective, parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.abs().max() > 0 and torch.allclose(one, other, **tolerance)


def test_loss_of_a_sample_is_cross_entropy():
    batch, logits = random_batch(0), torch.randn(96)
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    assert torch.allclose(Loss().losses(logits, batch), losses)


def test_erm_is_the_mean_over_environments():
    batch, network = random_batch(0), MLP()
    logits = network(batch.images)
    expected = environment_risks(logits, batch)
    assert torch.allclose(ERM()(network, batch), sum(expected) / 2)
    assert torch.allclose(ERM().risks(logits, batch), torch.stack(expected))
    assert (batch.envs == 0).sum() != (batch.envs == 1).sum()  # it is not the mean over samples


@pytest.mark.parametrize("reg_lambda", [50.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_irm_is_equation_4(seed, reg_lambda):
    """Whether ∂R_e(w · Φ)/∂w at w = 1 is had by autograd or as the mean of (σ(Φ) - y) Φ."""
    torch.manual_seed(seed)
    batch, network = random_batch(seed), MLP().double()
    batch = batch._replace(images=batch.images.double(), labels=batch.labels.double())
    for parameter in network.phi.parameters():
        parameter.data *= 3  # untrained logits are so small that the penalty says little
    phi = network.phi(batch.images).squeeze(1)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    risks = environment_risks(w * phi, batch)
    by_autograd = [torch.autograd.grad(risk, w, create_graph=True)[0] for risk in risks]
    each = (torch.sigmoid(phi) - batch.labels) * phi
    closed = [each[batch.envs == e].mean() for e in (0, 1)]
    loss = IRM() if reg_lambda == 50.0 else IRM(reg_lambda)
    objective = loss(network, batch)
    for slopes in (by_autograd, closed):
        expected = sum(risks) / 2 + reg_lambda * sum(slope**2 for slope in slopes) / 2
        assert torch.allclose(objective, expected, rtol=1e-9)
        assert objective > 1.02 * sum(risks) / 2
        parameters = list(network.phi.parameters())
        assert_same_gradients(objective, expected, parameters, rtol=1e-7, atol=1e-9)


def test_group_dro_follows_algorithm_1():
    """q is uniform at first, kept from step to step, and held constant in each."""
    loss, q = GroupDRO(eta=0.3), [0.5, 0.5]
    assert loss.q.tolist() == q
    for step in range(5):
        batch, network = random_batch(step), given(step)
        risks = environment_risks(network.logits, batch)
        q = [q_e * math.exp(0.3 * risk.item()) for q_e, risk in zip(q, risks, strict=True)]
        q = [q_e / sum(q) for q_e in q]
        expected = sum(q_e * risk for q_e, risk in zip(q, risks, strict=True))
        objective = loss(network, batch)
        assert torch.allclose(loss.q, torch.tensor(q)) and not loss.q.requires_grad
        assert torch.allclose(objective, expected)
        assert_same_gradients(objective, expected, [network.logits], rtol=1e-4, atol=1e-7)
    assert abs(q[0] - q[1]) > 0.01


def test_group_dro_survives_a_huge_step():
    loss = GroupDRO(eta=1e6)
    for step in range(3):
        assert loss(Given(100 * torch.randn(96)), random_batch(step)).isfinite()


@pytest.mark.parametrize("adjustment", ["offset", "weights"])
def test_backdoor_on_minibatches(adjustment):
    """Over the strata of colour and environment, with P(y | s) of all samples seen until then.

    "offset": cross entropy of σ(Φ + log odds of y in s). "weights": inverse propensities,
    Σ P(s) E[loss / P(y | s)] / 2. Each count starts at a half, so that none is 0.
    """
    loss, seen = Backdoor(adjustment), []
    for step in range(3):
        batch, network, expected = random_batch(step), given(step), 0
        seen.append(batch)
        labels, colors, envs = (torch.cat([b[i] for b in seen]) for i in (1, 2, 3))
        for e in (0, 1):
            for z in (0, 1):
                ones = labels[(envs == e) & (colors == z)]
                p = (ones.sum() + 0.5) / (len(ones) + 1)  # P(y = 1 | z, e)
                stratum = (batch.envs == e) & (batch.colors == z)
                y, phi = batch.labels[stratum], network.logits[stratum]
                if adjustment == "offset":
                    fitted = torch.sigmoid(phi + torch.log(p / (1 - p)))
                    losses = -torch.log(torch.where(y == 1, fitted, 1 - fitted))
                else:
                    losses = F.binary_cross_entropy_with_logits(phi, y, reduction="none")
                    losses = losses / torch.where(y == 1, p, 1 - p) / 2
                expected += stratum.float().mean() * losses.mean()
        objective = loss(network, batch)
        assert torch.allclose(objective, expected)
        assert_same_gradients(objective, expected, [network.logits], rtol=1e-4, atol=1e-7)
    assert loss.counts.sum() == 3 * 96 + 4


def population(of_each=1000):
    """The exact population of train1: half of the digits of each class, flips 0.2 and 0.1.

    A batch without sampling noise; in place of its images the class of each of its samples.
    """
    rows = []
    for digit in (0, 1):
        for flipped, p_label in ((0, 0.8), (1, 0.2)):
            for mistaken, p_color in ((0, 0.9), (1, 0.1)):
                label = digit ^ flipped
                rows += [(digit, label, label ^ mistaken)] * round(of_each * p_label * p_color)
    digit, labels, colors = torch.tensor(rows).T
    assert len(digit) == 2 * of_each
    return Batch(digit, labels.float(), colors, torch.zeros_like(digit))


class OfEachClass(Given):
    """A logit for either class of digits."""

    def forward(self, images):
        return self.output_layer * self.logits[images]


def fit(loss, batch):
    """The logits of the two classes that minimise the loss."""
    network = OfEachClass(torch.zeros(2))
    optimizer = torch.optim.LBFGS([network.logits], max_iter=50, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = loss(network, batch)
        value.backward()
        return value

    optimizer.step(objective)
    return network.logits.detach()


def test_backdoor_adjustment_of_the_exact_population():
    """P(y = 1 | do(x)) = Σ_z P(y = 1 | x, z) P(z), with what the population itself says of it."""
    batch, expected = population(), []
    for x in (0, 1):
        # P(y | x, z) ∝ P(y | x) P(z | y): the digit says nothing about the colour but by the label.
        p_x = 0
        for z in (0, 1):
            odds = [
                (0.8 if y == x else 0.2) * (0.9 if z == y else 0.1) * (batch.colors == z).sum()
                for y in (0, 1)
            ]
            p_x += odds[1] / sum(odds) * (batch.colors == z).float().mean()
        expected.append(p_x)
    expected = torch.tensor(expected)
    assert torch.allclose(expected, torch.tensor([0.3597, 0.6403]), atol=1e-4)

    loss = Backdoor(adjustment="offset")
    logits = fit(loss, batch)
    assert torch.allclose(loss.probability(logits), expected, atol=0.005)
    samples = logits[batch.images].view(2, -1)
    assert loss.probability(samples).shape == samples.shape
    # What the digit alone says of the label, whatever the colour does with it.
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)


def test_probability_weighs_the_strata():
    """By how many samples each has: three quarters here have log odds of 3, one quarter has 0."""
    loss = Backdoor()
    counts = [[10.0, 10 * math.exp(3)], [0, 0], [0, 0], [0, 0]]
    counts[1] = [sum(counts[0]) / 6] * 2
    loss.counts = torch.tensor(counts) + 1e-9
    logits = torch.tensor([-3.0, 0.0, 1.0])
    expected = 0.75 * torch.sigmoid(logits + 3) + 0.25 * torch.sigmoid(logits)
    assert torch.allclose(loss.probability(logits), expected, atol=1e-5)


def test_balancing_gives_the_posterior_of_balanced_labels():
    """Adjustment of the image given the label: 0.2 and 0.8, other probabilities, the same Φ."""
    batch = population()
    logits = fit(Backdoor(adjustment="weights"), batch)
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)
    assert torch.allclose(logits, fit(Backdoor(adjustment="offset"), batch), atol=0.03)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("environments", [(0,), (1,), (0, 1)])
def test_missing_groups_give_no_nan(make, size, environments):
    """Neither in the objective nor in a gradient, of the logits or of the output layer."""
    loss = make()
    for seed in range(20):
        network, batch = given(seed, size), random_batch(seed, size, environments)
        objective = loss(network, batch)
        assert objective.isfinite() and objective.shape == ()
        objective.backward()
        assert network.logits.grad.isfinite().all() and network.output_layer.grad.isfinite()


@pytest.mark.parametrize("present", [0, 1])
def test_means_are_over_the_environments_that_a_minibatch_has(present):
    batch, network = random_batch(0, environments=(present,)), given(0)
    risk = environment_risks(network.logits, batch)[present]
    slope = ((torch.sigmoid(network.logits) - batch.labels) * network.logits).mean()
    assert Loss().present(batch) == [present]
    assert torch.allclose(Loss().risks(network.logits, batch), risk[None])
    assert torch.allclose(ERM()(network, batch), risk)
    assert torch.allclose(IRM(7.0)(network, batch), risk + 7 * slope**2)
    loss, q = GroupDRO(eta=0.4), [0.5, 0.5]
    for _ in range(2):  # q of the absent one is not multiplied
        q[present] *= math.exp(0.4 * risk.item())
        q = [q_e / sum(q) for q_e in q]
        assert torch.allclose(loss(network, batch), q[present] * risk)
        assert torch.allclose(loss.q, torch.tensor(q))
    both = random_batch(1)
    assert Loss().present(both) == [0, 1]


@pytest.mark.parametrize("make", ALL)
def test_losses_of_two_trainings_are_separate(make):
    """An instance keeps what it knows to itself."""
    batch, other, network = random_batch(0), random_batch(1), given(0)
    first, second = make(), make()
    expected = first(network, batch)
    make()(network, other)
    assert torch.equal(second(network, batch), expected)


@pytest.mark.parametrize("make", ALL)
def test_state_changes_in_training_mode_only(make):
    loss, network = make(), given(0)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    loss(network, random_batch(0))
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())
    loss.train()
    loss(network, random_batch(0))
    assert not any(torch.equal(loss.state_dict()[name], value) for name, value in before.items())
    assert len(before) == isinstance(loss, (GroupDRO, Backdoor))


@pytest.mark.parametrize("make", ALL)
def test_state_is_saved_loaded_and_moved(make):
    """It stands in buffers, so a loaded loss goes on where the saved one stopped."""
    loss, loaded, network = make(), make(), given(0)
    loss(network, random_batch(0))
    loaded.load_state_dict(loss.state_dict())
    assert torch.equal(loaded(network, random_batch(1)), loss(network, random_batch(1)))
    moved = loss.to("meta")  # the device that every machine has
    assert all(value.is_meta for value in moved.state_dict().values())


def test_a_loss_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="forward"):
        Loss()(given(0), random_batch(0))


def test_mlp_is_the_assignments():
    """On red and green: blue is 0 throughout."""
    network = MLP()
    shapes = [tuple(p.shape) for p in network.phi.parameters()]
    assert shapes == [(64, 1568), (16, 64), (1, 16)]
    layers = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in network.phi] == layers
    assert network(torch.randn(5, 2, 28, 28)).shape == (5,)


def test_output_layer_is_one_and_multiplies_the_logit():
    for network in (MLP(), CNN()):
        assert network.output_layer == 1 and network.output_layer.shape == ()
        assert isinstance(network.output_layer, nn.Parameter) and network.output_layer.requires_grad
        assert network.output_layer not in set(network.phi.parameters())
        network.eval()
        images = torch.randn(3, 2, 28, 28)
        logits = network(images)
        network.output_layer.data.fill_(2)
        assert torch.equal(network(images), 2 * logits)


def test_settings_of_the_mlp():
    rich = MLP((8, 4, 2), bias=True, drop_rate=0.5, grayscale=True)
    linear = [layer for layer in rich.phi if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(8, 784), (4, 8), (2, 4), (1, 2)]
    assert all(layer.bias is not None for layer in linear)
    assert [layer.p for layer in rich.phi if isinstance(layer, nn.Dropout)] == [0.5] * 3
    assert rich(torch.randn(5, 2, 28, 28)).shape == (5,)
    line = MLP(hidden_dim=())
    assert [tuple(p.shape) for p in line.phi.parameters()] == [(1, 1568)]


def assert_equal_weights(network, layers):
    """A network's layers have the weights of these, bit for bit."""
    ours = [layer for layer in network.phi if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer, drawn in zip(ours, layers, strict=True):
        assert torch.equal(layer.weight, drawn.weight[:, : layer.weight.shape[1]])
        assert (layer.bias is None) == (drawn.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, drawn.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grayscale", [False, True])
def test_initial_weights_of_the_mlp_are_torchs(bias, grayscale):
    """As `nn.Linear` draws them for RGB or, with the colours hidden, for one channel."""
    inputs = 784 if grayscale else 2352
    torch.manual_seed(5)
    network = MLP(bias=bias, grayscale=grayscale)
    torch.manual_seed(5)
    shapes = ((inputs, 64), (64, 16), (16, 1))
    assert_equal_weights(network, [nn.Linear(*shape, bias) for shape in shapes])
    first, *hidden, last = (layer for layer in network.phi if isinstance(layer, nn.Linear))
    assert first.in_features == first.weight.shape[1] == (784 if grayscale else 1568)
    for layer, fan_in in ((first, inputs), *((layer, 64) for layer in hidden), (last, 16)):
        bound = 1 / math.sqrt(fan_in)
        assert (0.9 if layer is not last else 0.5) * bound < layer.weight.abs().max() <= bound
        assert not bias or (0 < layer.bias.abs().max() <= bound)
    assert first.weight.std().item() == pytest.approx(
        1 / math.sqrt(3 * inputs), rel=0.02
    )  # uniform


@pytest.mark.parametrize("grayscale", [False, True])
def test_initial_weights_of_the_cnn_are_torchs(grayscale):
    """Its first layer's as for three channels; for one with the colours hidden."""
    channels = 1 if grayscale else 3
    torch.manual_seed(5)
    network = CNN(grayscale=grayscale)
    torch.manual_seed(5)
    convolutions = [nn.Conv2d(channels, 32, 5), nn.Conv2d(32, 64, 5)]
    assert_equal_weights(network, [*convolutions, nn.Linear(1024, 64), nn.Linear(64, 1)])
    first = network.phi[0]
    assert first.in_channels == first.weight.shape[1] == (1 if grayscale else 2)
    assert first.weight.abs().max() <= 1 / math.sqrt(25 * channels)


def test_cnn_is_the_course_projects():
    """Convolutions with ReLU and pooling, 64 hidden units, one logit, in whichever order."""
    network, images = CNN(0.3).eval(), torch.randn(3, 2, 28, 28)
    convolution, second = (layer for layer in network.phi if isinstance(layer, nn.Conv2d))
    hidden, last = (layer for layer in network.phi if isinstance(layer, nn.Linear))
    assert [layer.p for layer in network.phi if isinstance(layer, nn.Dropout)] == [0.3]
    x = F.max_pool2d(F.relu(convolution(images)), 2)
    x = F.max_pool2d(F.relu(second(x)), 2).flatten(1)
    expected = last(F.relu(hidden(x))).squeeze(1)
    assert network(images).shape == (3,)
    assert torch.allclose(network(images), expected, atol=1e-5)


@pytest.mark.parametrize("make", [MLP, CNN])
def test_networks_take_rgb_or_red_and_green(make):
    network = make().eval()
    images = torch.randn(9, 3, 28, 28)
    assert torch.equal(network(images), network(images[:, :2]))
    assert not torch.allclose(network(images.flip(1)), network(images))


@pytest.mark.parametrize("make", [MLP, CNN])
def test_grayscale_hides_the_colours(make):
    """The brighter channel is the digit's: its grey levels, whichever of the two it is in."""
    network = make(grayscale=True).eval()
    images = torch.randn(9, 2, 28, 28)
    assert torch.equal(network(images.flip(1)), network(images))
    brighter = torch.maximum(images[:, :1], images[:, 1:])
    assert torch.equal(network.channels(images), brighter)
    assert torch.equal(network(images), network.phi(brighter).squeeze(1))
    assert torch.equal(make().channels(images), images)


class OnRGB(Network):
    """The assignment's network to the letter: 2352 inputs, blue among them."""

    def __init__(self):
        layers = [nn.Flatten(), nn.Linear(2352, 64, False), nn.ReLU()]
        layers += [nn.Linear(64, 16, False), nn.ReLU(), nn.Linear(16, 1, False)]
        super().__init__(nn.Sequential(*layers))

    def channels(self, images):
        return images


def test_without_blue_it_is_the_same_training():
    """Blue is constant 0: its weights change no logit, and get no gradient."""
    torch.manual_seed(0)
    small = MLP()
    torch.manual_seed(0)
    whole = OnRGB()
    batch = random_batch(0, 9)
    rgb = F.pad(batch.images, (0, 0, 0, 0, 0, 1))
    assert torch.allclose(whole(rgb), small(batch.images), atol=1e-6)
    IRM()(whole, batch._replace(images=rgb)).backward()
    IRM()(small, batch).backward()
    ours, theirs = small.phi[1].weight.grad, whole.phi[1].weight.grad
    assert torch.allclose(ours, theirs[:, :1568], atol=1e-6) and not theirs[:, 1568:].any()
