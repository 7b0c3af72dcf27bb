"""The losses against independent computations of their equations, and the networks."""

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
    """A network whose parameters are the logits of the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.output_layer = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.output_layer * self.logits


def given(seed, size=96):
    return Given(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def environment_risks(logits, batch):
    """Return L_0 and L_1: the mean of -log P(y) over an environment's samples."""
    p = torch.sigmoid(logits)
    losses = -(batch.labels * p.log() + (1 - batch.labels) * (1 - p).log())
    return [losses[batch.envs == e].mean() for e in (0, 1)]


def assert_same_gradients(objective, expected, parameters, **tolerance):
    ours = torch.autograd.grad(objective, parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.abs().max() > 0 and torch.allclose(one, other, **tolerance)


def test_erm_is_the_mean_over_environments():
    batch, network = random_batch(0), MLP()
    logits = network(batch.images)
    expected = environment_risks(logits, batch)
    assert torch.allclose(ERM()(network, batch), sum(expected) / 2)
    assert torch.allclose(ERM().risks(logits, batch), torch.stack(expected))
    assert (batch.envs == 0).sum() != (batch.envs == 1).sum()  # it is not the mean over samples


@pytest.mark.parametrize("reg_lambda", [50.0, 3.0])
def test_irm_is_equation_4(reg_lambda):
    """∂L_e(w · Φ)/∂w at w = 1 is computed by autograd, and as the mean of (σ(Φ) - y) Φ."""
    torch.manual_seed(0)
    batch, network = random_batch(0), MLP().double()
    batch = batch._replace(images=batch.images.double(), labels=batch.labels.double())
    for parameter in network.phi.parameters():
        parameter.data *= 3  # the penalty of untrained logits is too small for a comparison
    phi = network.phi(batch.images).squeeze(1)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    risks = environment_risks(w * phi, batch)
    by_autograd = [torch.autograd.grad(risk, w, create_graph=True)[0] for risk in risks]
    slopes = (torch.sigmoid(phi) - batch.labels) * phi
    closed_form = [slopes[batch.envs == e].mean() for e in (0, 1)]
    loss = IRM() if reg_lambda == 50.0 else IRM(reg_lambda)
    objective = loss(network, batch)
    for gradients in (by_autograd, closed_form):
        expected = sum(risks) / 2 + reg_lambda * sum(one**2 for one in gradients) / 2
        assert torch.allclose(objective, expected, rtol=1e-9)
        assert objective > 1.02 * sum(risks) / 2
        parameters = list(network.phi.parameters())
        assert_same_gradients(objective, expected, parameters, rtol=1e-7, atol=1e-9)


def test_group_dro_follows_algorithm_1():
    """q starts uniform, persists over steps, and is constant in each step's objective."""
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


def test_group_dro_does_not_overflow():
    loss = GroupDRO(eta=1e6)
    for step in range(3):
        assert loss(Given(100 * torch.randn(96)), random_batch(step)).isfinite()


@pytest.mark.parametrize("adjustment", ["offset", "weights"])
def test_backdoor_counts_the_strata_in_minibatches(adjustment):
    """P(y | s) is counted in all samples until this step, for strata of colour and environment.

    "offset" is the cross entropy of σ(Φ + log odds of y in s). "weights" is Σ P(s) E[loss /
    P(y | s)] / 2. Each count starts at a half, so none is 0.
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
    counts = [
        [((envs == e) & (colors == z) & (labels == y)).sum() + 0.5 for y in (0, 1)]
        for e in (0, 1)
        for z in (0, 1)
    ]
    assert torch.equal(loss.counts, torch.tensor(counts))


def population(of_each=1000):
    """Return the exact population of train1: half of the digits of each class, flips 0.2 and 0.1.

    It has no sampling noise. In place of its images, the batch has the class of each digit.
    """
    rows = []
    for digit in (0, 1):
        for label_flipped, p_label in ((0, 0.8), (1, 0.2)):
            for color_flipped, p_color in ((0, 0.9), (1, 0.1)):
                label = digit ^ label_flipped
                rows += [(digit, label, label ^ color_flipped)] * round(of_each * p_label * p_color)
    digit, labels, colors = torch.tensor(rows).T
    assert len(digit) == 2 * of_each
    return Batch(digit, labels.float(), colors, torch.zeros_like(digit))


class OfEachClass(Given):
    """A network with one logit for each class of digits."""

    def forward(self, images):
        return self.output_layer * self.logits[images]


def fit(loss, batch):
    """Return the logits of the two classes that minimise the loss."""
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
    """The fit gives P(y = 1 | do(x)) = Σ_z P(y = 1 | x, z) P(z), computed from the population."""
    batch, expected = population(), []
    for x in (0, 1):
        # P(y | x, z) ∝ P(y | x) P(z | y), because digit and colour are independent given the label.
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
    # σ(Φ) is the probability of the label given the digit alone.
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)


def test_probability_weights_strata_by_their_samples():
    """Three quarters of the samples have log odds of 3, one quarter has log odds of 0."""
    loss = Backdoor()
    counts = [[10.0, 10 * math.exp(3)], [0, 0], [0, 0], [0, 0]]
    counts[1] = [sum(counts[0]) / 6] * 2
    loss.counts = torch.tensor(counts) + 1e-9
    logits = torch.tensor([-3.0, 0.0, 1.0])
    expected = 0.75 * torch.sigmoid(logits + 3) + 0.25 * torch.sigmoid(logits)
    assert torch.allclose(loss.probability(logits), expected, atol=1e-5)


def test_probability_in_the_assignments_data():
    """For the digits 5-9, P(y = 1 | do(x)) is 0.72, and P(y = 1 | x) is 0.80."""
    loss = Backdoor()
    loss.counts = 10000 * torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    logits = torch.tensor([0.8 / 0.2]).log()
    assert abs(loss.probability(logits).item() - 0.7162) < 1e-4


def test_balancing_gives_the_posterior_of_balanced_labels():
    """It is the adjustment of the image given the label: 0.2 and 0.8, with the same Φ."""
    batch = population()
    logits = fit(Backdoor(adjustment="weights"), batch)
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)
    assert torch.allclose(logits, fit(Backdoor(adjustment="offset"), batch), atol=0.03)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("environments", [(0,), (1,), (0, 1)])
def test_small_minibatches_give_no_nan(make, environments):
    """Neither the objective nor a gradient is nan if environments or strata are missing."""
    loss = make()
    for seed in range(20):
        for size in (1, 2, 3, 7):
            network, batch = given(seed, size), random_batch(seed, size, environments)
            objective = loss(network, batch)
            assert objective.isfinite() and objective.shape == ()
            objective.backward()
            assert network.logits.grad.isfinite().all() and network.output_layer.grad.isfinite()


@pytest.mark.parametrize("present", [0, 1])
def test_means_are_over_the_environments_in_a_minibatch(present):
    batch, network = random_batch(0, environments=(present,)), given(0)
    risk = environment_risks(network.logits, batch)[present]
    slope = ((torch.sigmoid(network.logits) - batch.labels) * network.logits).mean()
    assert Loss().present(batch) == [present]
    assert torch.allclose(Loss().risks(network.logits, batch), risk[None])
    assert torch.allclose(ERM()(network, batch), risk)
    assert torch.allclose(IRM(7.0)(network, batch), risk + 7 * slope**2)
    loss, q = GroupDRO(eta=0.4), [0.5, 0.5]
    for _ in range(2):  # the q of the absent environment is renormalised only
        q[present] *= math.exp(0.4 * risk.item())
        q = [q_e / sum(q) for q_e in q]
        assert torch.allclose(loss(network, batch), q[present] * risk)
        assert torch.allclose(loss.q, torch.tensor(q))


@pytest.mark.parametrize("make", ALL)
def test_state_of_a_loss(make):
    """It changes in training mode only, is saved and loaded, and moves with the loss."""
    loss, loaded, network = make(), make(), given(0)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert len(before) == isinstance(loss, (GroupDRO, Backdoor))
    loss.eval()
    loss(network, random_batch(0))
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())
    loss.train()
    loss(network, random_batch(0))
    assert not any(torch.equal(loss.state_dict()[name], value) for name, value in before.items())
    loaded.load_state_dict(loss.state_dict())
    assert torch.equal(loaded(network, random_batch(1)), loss(network, random_batch(1)))
    moved = loss.to("meta")  # a device that every machine has
    assert all(value.is_meta for value in moved.state_dict().values())


def test_mlp_is_the_assignments():
    """Its inputs are red and green, because blue is always 0."""
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


@pytest.mark.parametrize(("make", "units"), [(MLP, 16), (CNN, 64)])
@pytest.mark.parametrize("grayscale", [False, True])
def test_features_and_logits_compose_to_forward(make, units, grayscale):
    """A loss on hidden features, such as CORAL, needs one pass only."""
    network = make(grayscale=grayscale).eval()
    images = torch.randn(5, 2, 28, 28)
    features = network.features(images)
    assert features.shape == (5, units) and (features >= 0).all()  # after ReLU
    assert torch.equal(network.logits(features), network(images))
    expected = features @ network.phi[-1].weight[0]
    if network.phi[-1].bias is not None:
        expected = expected + network.phi[-1].bias
    assert torch.allclose(network(images), expected, atol=1e-6)


def test_arguments_of_the_mlp():
    rich = MLP((8, 4, 2), bias=True, drop_rate=0.5, grayscale=True)
    linear = [layer for layer in rich.phi if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(8, 784), (4, 8), (2, 4), (1, 2)]
    assert all(layer.bias is not None for layer in linear)
    assert [layer.p for layer in rich.phi if isinstance(layer, nn.Dropout)] == [0.5] * 3
    assert rich(torch.randn(5, 2, 28, 28)).shape == (5,)
    no_hidden_layer = MLP(hidden_dim=())
    assert [tuple(p.shape) for p in no_hidden_layer.phi.parameters()] == [(1, 1568)]


def assert_equal_weights(network, layers):
    """Assert that a network has the weights of these layers, bit for bit, without blue."""
    ours = [layer for layer in network.phi if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer, initial in zip(ours, layers, strict=True):
        assert torch.equal(layer.weight, initial.weight[:, : layer.weight.shape[1]])
        assert (layer.bias is None) == (initial.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, initial.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grayscale", [False, True])
def test_initial_weights_of_the_mlp_are_torchs(bias, grayscale):
    """`nn.Linear` initialises the first layer for RGB or, with grayscale, for one channel."""
    inputs = 784 if grayscale else 2352
    torch.manual_seed(5)
    network = MLP(bias=bias, grayscale=grayscale)
    torch.manual_seed(5)
    shapes = ((inputs, 64), (64, 16), (16, 1))
    assert_equal_weights(network, [nn.Linear(*shape, bias) for shape in shapes])
    first = network.phi[1]
    assert first.in_features == first.weight.shape[1] == (784 if grayscale else 1568)
    bound = 1 / math.sqrt(inputs)
    assert 0.9 * bound < first.weight.abs().max() <= bound


@pytest.mark.parametrize("grayscale", [False, True])
def test_initial_weights_of_the_cnn_are_torchs(grayscale):
    """`nn.Conv2d` initialises the first layer for RGB or, with grayscale, for one channel."""
    channels = 1 if grayscale else 3
    torch.manual_seed(5)
    network = CNN(grayscale=grayscale)
    torch.manual_seed(5)
    convolutions = [nn.Conv2d(channels, 32, 5), nn.Conv2d(32, 64, 5)]
    assert_equal_weights(network, [*convolutions, nn.Linear(1024, 64), nn.Linear(64, 1)])
    first = network.phi[0]
    assert first.in_channels == first.weight.shape[1] == (1 if grayscale else 2)


def test_cnn_is_the_course_projects():
    """It has convolutions with ReLU and pooling, 64 hidden units and one logit."""
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
    """The brighter channel has the digit, whichever of the two it is."""
    network = make(grayscale=True).eval()
    images = torch.randn(9, 2, 28, 28)
    assert torch.equal(network(images.flip(1)), network(images))
    brighter = torch.maximum(images[:, :1], images[:, 1:])
    assert torch.equal(network.channels(images), brighter)
    assert torch.equal(network(images), network.phi(brighter).squeeze(1))
    assert torch.equal(make().channels(images), images)


class OnRGB(Network):
    """The assignment's network to the letter: 2352 inputs, including blue."""

    def __init__(self):
        layers = [nn.Flatten(), nn.Linear(2352, 64, False), nn.ReLU()]
        layers += [nn.Linear(64, 16, False), nn.ReLU(), nn.Linear(16, 1, False)]
        super().__init__(nn.Sequential(*layers))

    def channels(self, images):
        return images


def test_training_without_blue_is_the_same():
    """The weights of blue change no logit and get no gradient, because blue is always 0."""
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
