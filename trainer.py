"""Train one network, evaluate it, repeat over seeds, summarise; and the arguments of all that."""

import argparse
import inspect
import itertools
import math
import runpy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.optim.adam import adam
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from dataset import Split, minibatches
from metric import metrics
from model import Loss, Network
from preprocessing import (
    Digits,
    Parser,
    UserError,
    add_data_arguments,
    load_dataset,
    make_folder,
    number,
    one_line,
    replacing,
)
from register import NETWORKS, TRAINERS, canonical_name


def training_parser(description: str) -> Parser:
    """The command line that every training shares."""
    count, rate = number(int, 1), number(float, 0, above=True)
    parser = Parser(description)
    add_data_arguments(parser)
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="seed of all random draws")
    add("--data_seed", type=number(int, 0, 2**32 - 1), help="insist on data drawn with this seed")
    add("--trainer", default="ERM", help=f"one of {', '.join(TRAINERS)}, or one of --plugin's")
    add("--network", default="MLP", help=f"one of {', '.join(NETWORKS)}, or one of --plugin's")
    add("--plugin", metavar="FILE", help="Python file to run first, to register names of your own")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--grayscale", action="store_true", help="hide the colours: the oracle")
    add("--image_size", type=int, choices=(28, 14), default=28, help="pixels per side")
    add("--raw_pixels", action="store_true", help="images as value / 255, not normalised")
    add(
        "--hidden_dim", type=count, nargs="+", default=(64, 16), help="units per hidden layer (MLP)"
    )
    add("--bias", action="store_true", help="give the layers biases (MLP)")
    add("--batchnorm", action="store_true", help="normalise hidden layers over the minibatch (MLP)")
    add("--learning_rate", type=rate, default=1e-3, help="step size of Adam")
    add("--weight_decay", type=number(float, 0), default=0.0, help="L2 coefficient of Adam")
    add(
        "--max_gradient_norm",
        type=number(float, 0),
        default=0.1,
        help="longer gradients are shortened to this (Pascanu et al. 2013), 0: none are",
    )
    for name, kind, meaning in (
        ("batch_size", count, "images per minibatch"),
        ("iteration", count, "minibatches per training"),
        (
            "average_last",
            number(float, 0, 1),
            "proportion of the iterations, the last ones, whose weights are averaged "
            "(Izmailov et al. 2018), 0 to 1",
        ),
        ("drop_rate", number(float, 0, 0.99), "proportion of hidden units dropped, 0 to 0.99"),
        ("init_scale", rate, "factor of the first layer's initial weights"),
        ("epsilon", rate, "what Adam adds to the root of its second moment"),
        ("shift", number(int, 0, 13), "pixels by which training images are moved at most, 0 to 13"),
    ):
        having = {k: c for k, c in (NETWORKS | TRAINERS).items() if name in c.defaults}
        own = ", ".join(f"{cls.defaults[name]} for {key}" for key, cls in having.items())
        add(f"--{name}", type=kind, help=f"{meaning} (default: {own})")
    add(
        "--evaluation_steps",
        type=count,
        default=20,
        help="iterations from one log line to the next",
    )
    add(
        "--validation",
        type=number(float, 0, 0.9),
        default=0.2,
        help="proportion held out, 0 to 0.9",
    )
    add("--repetitions", type=count, default=3, help="trainings, each with draws of its own")
    add("--eta", type=number(float, 0), default=0.05, help="step size of groupDRO's weights q")
    add("--reg_lambda", type=number(float, 0), default=50.0, help="weight of the penalty")
    add(
        "--penalty",
        choices=("unbiased", "plain"),
        default="unbiased",
        help="IRM's estimate of a squared gradient: unbiased (Arjovsky et al. 2019, section 3.2), "
        "or plainly the square of the minibatch's",
    )
    add(
        "--adjustment",
        choices=("offset", "weights"),
        default="offset",
        help="Backdoor's estimate: by maximum likelihood with the log odds of each environment and "
        "colour as an offset, or by inverse propensities as weights",
    )
    add(
        "--anneal_iterations",
        type=number(int, 0),
        default=0,
        help="IRM: iterations with λ = 1; after them the objective is divided by reg_lambda",
    )
    add("--save_model", metavar="DIR", help="folder to save each repetition's network in")
    return parser


def parse_arguments(parser: Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse, run the plugin, look names up, fill in the defaults of the trainer and the network."""
    args = parser.parse_args(arguments)
    if args.plugin:
        try:
            runpy.run_path(args.plugin)
        except OSError as error:
            parser.error(f"argument --plugin: cannot read {args.plugin}: {error.strerror}")
    try:
        args.trainer = canonical_name(TRAINERS, args.trainer)
        args.network = canonical_name(NETWORKS, args.network)
    except ValueError as error:
        parser.error(str(error))
    defaults = NETWORKS[args.network].defaults | TRAINERS[args.trainer].defaults
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.save_model:
        make_folder(Path(args.save_model))
    return args


def construct(cls: type, options: dict) -> object:
    """An instance of `cls`, given those of the options that its constructor takes."""
    known = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in options.items() if name in known})


# Arguments that go to `train` as they are.
SETTINGS = (
    "batch_size",
    "learning_rate",
    "epsilon",
    "weight_decay",
    "max_gradient_norm",
    "shift",
    "evaluation_steps",
)


class Run(NamedTuple):
    """One repetition: what is trained, and on what."""

    number: int  # from 1
    network: Network
    train: Split
    validation: Split | None
    generator: torch.Generator  # orders the samples


class Repetition(NamedTuple):
    """One training and what came of it."""

    network: Network
    train: Split
    test: Split
    result: dict[str, float]
    flip_rate: float


def repetitions(
    args: argparse.Namespace, harden: Callable[..., Network] | None = None
) -> Iterator[Repetition]:
    """Train and test as the arguments say, once per repetition, writing the log on the way.

    Args:
        args: from `parse_arguments`.
        harden: called with each run, its network trained, and the settings that `train` was called
            with; returns the network to test instead.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    print(f"Arguments: {vars(args)}")
    print(f"Device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    data = load_dataset(
        args.dataset_path, args.p_f, args.p_e, args.data_seed, args.seed, args.sizes
    )
    print(f"Data: {data.description}", flush=True)

    def on_device(digits: Digits) -> Split:
        return Split(digits, device, args.image_size, args.raw_pixels)

    test, all_train = on_device(data.test).by_color(), on_device(data.train)
    given_validation = data.validation and on_device(data.validation)
    del data
    runs = [
        start(args, number, all_train, given_validation)
        for number in range(1, args.repetitions + 1)
    ]
    settings = {name: getattr(args, name) for name in SETTINGS}
    train(
        runs,
        construct(TRAINERS[args.trainer], vars(args)),
        iterations=args.iteration,
        average_last=round(args.average_last * args.iteration),
        **settings,
    )
    for run in runs:
        print(f"Repetition {run.number} of {args.repetitions}")
        network = run.network
        if harden is not None:
            torch.manual_seed(seed_of(args, run.number))
            network = harden(run, **settings)
        logits, recolored = predict(network, test), predict(network, test, recolored=True)
        result = metrics(logits, test.labels[test.index])
        flips = ((logits > 0) != (recolored > 0)).double().mean().item()
        if args.save_model:
            save(args, run.number, network)
        print(f"Test result: {result}")
        print(f"Flip rate: {flips}", flush=True)
        yield Repetition(network, run.train, test, result, flips)


def seed_of(args: argparse.Namespace, number: int) -> int:
    """The seed of one repetition's draws."""
    return 1000 * args.seed + number - 1


def start(args: argparse.Namespace, number: int, data: Split, validation: Split | None) -> Run:
    """A repetition with its own draws: which samples are held out, their order, first weights."""
    generator = torch.Generator().manual_seed(seed_of(args, number))
    if validation is None and args.validation:
        data, validation = data.hold_out(args.validation, generator)
    if validation is not None:
        validation = validation.by_color()
    # Initial weights and dropout are drawn by torch, which reads its global generator.
    torch.manual_seed(seed_of(args, number))
    channels = 1 if args.grayscale else 2
    options = vars(args) | {"inputs": channels * data.images.shape[1], "channels": channels}
    network = construct(NETWORKS[args.network], options).to(data.images.device)
    network.scale_first_layer(args.init_scale)
    return Run(number, network, data, validation, generator)


def train(
    runs: Sequence[Run],
    loss: Loss,
    *,
    iterations: int = 400,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    max_gradient_norm: float = 0.0,
    average_last: int = 0,
    shift: int = 0,
    evaluation_steps: int = 20,
) -> None:
    """Minimise the loss with Adam, in place; leaves the networks in evaluation mode.

    The runs take each step together, as every operation costs time besides what it computes.

    Args:
        runs: their training data are parts of one split.
        loss: made for this training; called with the logits of all runs, (R, N).
        learning_rate, epsilon, weight_decay: of Adam (Kingma & Ba 2015; weight decay is L2).
        max_gradient_norm: a network's longer gradients are shortened to this norm (Pascanu et al.
            2013, "On the difficulty of training recurrent neural networks"). IRM's first gradients
            are tens of times as long as its later ones, and Adam's memory of them would shorten all
            steps that follow. 0 leaves gradients as they are.
        average_last: the networks get the mean of the weights after each of the last so many
            iterations (Izmailov et al. 2018, "Averaging weights leads to wider optima and better
            generalization"); 0: the last weights.
        shift: pixels by which each image is moved at most, at random.
        evaluation_steps: iterations from one log line to the next.

    Raises:
        UserError: an objective or a weight is no longer finite, or an objective is not one number
            for each run.
    """
    # All weights in one matrix, a row for each network, whose own parameters become views of it.
    of_each = [[p for p in run.network.train().parameters() if p.requires_grad] for run in runs]
    parameters = list(itertools.chain.from_iterable(of_each))
    weights = torch.stack([parameters_to_vector(own) for own in of_each]).detach()
    set_weights(of_each, weights)
    first_moment, second_moment, sum_of_weights = (torch.zeros_like(weights) for _ in range(3))
    step = torch.zeros((), device=weights.device)
    parts, generators = [run.train for run in runs], [run.generator for run in runs]
    batches = minibatches(parts, batch_size, generators, shift)
    progress = tqdm(range(1, iterations + 1), disable=None, leave=False)
    for iteration, batch in zip(progress, batches, strict=False):
        inputs = zip(runs, batch.images, batch.colors, strict=True)
        logits = torch.stack([run.network(images, colors) for run, images, colors in inputs])
        objectives = loss(logits, batch)
        if objectives.shape != (len(runs),):
            raise UserError(
                f"{type(loss).__name__} gives {tuple(objectives.shape)} objectives for logits of "
                f"{tuple(logits.shape)}: a loss is to reduce over the last dimension alone"
            )
        objective = objectives.sum()
        if not math.isfinite(objective.item()):
            raise diverged(iteration, "the objective")
        gradients = torch.autograd.grad(objective, parameters, materialize_grads=True)
        gradients = torch.cat([gradient.flatten() for gradient in gradients]).view_as(weights)
        if max_gradient_norm:
            norms = gradients.norm(dim=-1, keepdim=True)
            gradients *= (max_gradient_norm / norms).clamp(max=1)
        # The function behind torch.optim.Adam; the class spends a second importing a compiler.
        adam(
            [weights],
            [gradients],
            [first_moment],
            [second_moment],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=weight_decay / loss.divisor,
            eps=epsilon,
            maximize=False,
        )
        if iteration > iterations - average_last:
            sum_of_weights += weights
        if iteration % evaluation_steps == 0:
            for run, risks in zip(runs, loss.risks(logits.detach(), batch).tolist(), strict=True):
                line = f"Repetition {run.number}, iteration {iteration}: "
                line += f"loss of train1 {risks[0]:.4f}, train2 {risks[1]:.4f}"
                if run.validation is not None:
                    line += f"; validation {evaluate(run.network, run.validation)}"
                    run.network.train()
                print(line, flush=True)
    if not weights.isfinite().all():
        raise diverged(iterations, "a weight")
    trained = sum_of_weights / average_last if average_last else weights
    set_weights(of_each, [row.clone() for row in trained])  # no memory shared between networks
    for run in runs:
        finish(run, average_last > 0)


def set_weights(parameters: list[list[nn.Parameter]], weights: Iterable[Tensor]) -> None:
    """Make the parameters of each network views of its row of `weights`."""
    for own, row in zip(parameters, weights, strict=True):
        vector_to_parameters(row, own)


def finish(run: Run, averaged: bool) -> None:
    """Put a trained network into evaluation mode."""
    run.network.eval()
    for module in list(run.network.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    # Averaged weights need statistics of their own.
    if averaged and any(isinstance(module, nn.BatchNorm1d) for module in run.network.modules()):
        painted = (run.network.paint(batch.images, batch.colors) for batch in run.train.chunks())
        update_bn(painted, run.network)


def diverged(iteration: int, what: str) -> UserError:
    return UserError(
        f"training diverged: {what} is nan or infinite at iteration {iteration}; lower "
        "--learning_rate, --reg_lambda or --eta"
    )


@torch.no_grad()
def predict(network: Network, split: Split, recolored: bool = False) -> Tensor:
    """Logits (N,) of a whole split, with its digits in the other colour if `recolored`."""
    network.eval()
    return torch.cat(
        [
            network(batch.images, 1 - batch.colors if recolored else batch.colors)
            for batch in split.chunks()
        ]
    )


def evaluate(network: Network, split: Split) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on a whole split."""
    return metrics(predict(network, split), split.labels[split.index])


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean and population standard deviation of each metric over repetitions, as plain floats."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[f"{name}_testmean"] = statistics.fmean(values)
        summary[f"{name}_teststd"] = statistics.pstdev(values)
    return summary


def save(args: argparse.Namespace, number: int, network: Network) -> None:
    """Write the weights and the arguments that they came of to `--save_model`."""
    name = f"{args.trainer}_{args.network}_seed{args.seed}_repetition{number}.pt"
    path = Path(args.save_model) / name
    try:
        with replacing(path) as partial:
            torch.save({"arguments": vars(args), "state_dict": network.state_dict()}, partial)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from None
