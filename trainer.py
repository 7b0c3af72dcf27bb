"""Train one network, evaluate it, repeat over seeds, summarise; and the arguments of all that."""

import argparse
import inspect
import itertools
import math
import runpy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.adam import adam
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from dataset import Batch, Split
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
        harden: called with each trained network, its training split, a generator and the settings
            that `train` was called with; returns the network to test instead.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    print(f"Arguments: {vars(args)}")
    print(f"Device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    data = load_dataset(args.dataset_path, args.p_f, tuple(args.p_e), args.data_seed, args.seed)
    print(f"Data: {data.description}", flush=True)

    def on_device(digits: Digits) -> Split:
        return Split(digits, device, args.grayscale, args.image_size, args.raw_pixels)

    test, all_train = on_device(data.test).by_color(), on_device(data.train)
    given_validation = data.validation and on_device(data.validation)
    del data
    for repetition in range(args.repetitions):
        print(f"Repetition {repetition + 1} of {args.repetitions}")
        generator = torch.Generator().manual_seed(1000 * args.seed + repetition)
        train_split, validation = all_train, given_validation
        if validation is None and args.validation:
            train_split, validation = all_train.hold_out(args.validation, generator)
        if validation is not None:
            validation = validation.by_color().keep_chunks()
        # Initial weights and dropout are drawn by torch, which reads its global generator.
        torch.manual_seed(1000 * args.seed + repetition)
        channels = 1 if args.grayscale else 2
        network = construct(
            NETWORKS[args.network], vars(args) | {"inputs": test.inputs, "channels": channels}
        ).to(device)
        network.scale_first_layer(args.init_scale)
        settings = {
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "max_gradient_norm": args.max_gradient_norm,
            "evaluation_steps": args.evaluation_steps,
            "validation": validation,
        }
        network = train(
            network,
            construct(TRAINERS[args.trainer], vars(args)),
            train_split,
            generator,
            iterations=args.iteration,
            average_last=round(args.average_last * args.iteration),
            **settings,
        )
        if harden is not None:
            network = harden(network, train_split, generator, **settings)
        result, flips = evaluate(network, test), flip_rate(network, test)
        if args.save_model:
            save(args, repetition, network)
        print(f"Test result: {result}")
        print(f"Flip rate: {flips}", flush=True)
        yield Repetition(network, train_split, test, result, flips)


def train(
    network: Network,
    loss: Loss,
    split: Split,
    generator: torch.Generator,
    *,
    iterations: int = 400,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    max_gradient_norm: float = 0.0,
    average_last: int = 0,
    evaluation_steps: int = 20,
    validation: Split | None = None,
) -> Network:
    """Minimise the loss with Adam; return the trained network in evaluation mode.

    Args:
        network: trained in place; what is returned is a copy if weights are averaged.
        loss: made for this training.
        split: what to draw minibatches from.
        generator: orders the samples.
        max_gradient_norm: longer gradients are shortened to this norm (Pascanu et al. 2013, "On the
            difficulty of training recurrent neural networks"). IRM's first gradients are tens of
            times as long as its later ones, and Adam's memory of them would shorten all steps that
            follow. 0 leaves gradients as they are.
        average_last: return the mean of the weights after each of the last so many iterations
            (Izmailov et al. 2018, "Averaging weights leads to wider optima and better
            generalization"); 0 returns the last weights.
        evaluation_steps: iterations from one log line to the next.
        validation: what the metrics in the log are of, if anything.

    Raises:
        UserError: the objective or a weight is no longer finite.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    means = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    steps = [torch.zeros((), device=parameter.device) for parameter in parameters]
    averaged = None
    network.train()
    batches = itertools.islice(split.minibatches(batch_size, generator), iterations)
    progress = tqdm(batches, total=iterations, disable=None, leave=False)
    for iteration, batch in enumerate(progress, 1):
        logits = network(batch.images, batch.colors)
        objective = loss(logits, batch)
        if not math.isfinite(objective.item()):
            raise diverged(iteration, "the objective")
        objective.backward()
        if max_gradient_norm:
            nn.utils.clip_grad_norm_(parameters, max_gradient_norm)
        # The function behind torch.optim.Adam; the class spends a second importing a compiler.
        with torch.no_grad():
            adam(
                parameters,
                [parameter.grad for parameter in parameters],
                means,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=weight_decay / loss.divisor,
                eps=1e-8,
                maximize=False,
            )
        network.zero_grad()
        if iteration > iterations - average_last:
            averaged = averaged or AveragedModel(network)
            averaged.update_parameters(network)
        if iteration % evaluation_steps == 0:
            risks = loss.risks(logits.detach(), batch)
            line = f"Iteration {iteration}: loss of train1 {risks[0]:.4f}, train2 {risks[1]:.4f}"
            if validation is not None:
                line += f"; validation {evaluate(network, validation)}"
                network.train()
            print(line)
    if averaged is not None:
        network = averaged.module
    network.eval()
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    if averaged is not None and any(isinstance(m, nn.BatchNorm1d) for m in network.modules()):
        update_bn((batch.images for batch in split.chunks()), network)
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise diverged(iterations, "a weight")
    return network


def diverged(iteration: int, what: str) -> UserError:
    return UserError(
        f"training diverged: {what} is nan or infinite at iteration {iteration}; lower "
        "--learning_rate, --reg_lambda or --eta"
    )


@torch.no_grad()
def predict(network: nn.Module, split: Split, recolored: bool = False) -> Tensor:
    """Logits (N,) of a whole split, with its digits in the other colour if `recolored`."""
    network.eval()

    def logits(batch: Batch) -> Tensor:
        if recolored:
            return network(split.recolored(batch.images))
        return network(batch.images, batch.colors)

    return torch.cat([logits(batch) for batch in split.chunks()])


def evaluate(network: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on a whole split."""
    return metrics(predict(network, split), split.labels[split.index])


def flip_rate(network: nn.Module, split: Split) -> float:
    """Share of predictions that change when only the colour of the digit does, 0 to 1."""
    flips = (predict(network, split) > 0) != (predict(network, split, recolored=True) > 0)
    return flips.double().mean().item()


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean and population standard deviation of each metric over repetitions, as plain floats."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[f"{name}_testmean"] = statistics.fmean(values)
        summary[f"{name}_teststd"] = statistics.pstdev(values)
    return summary


def save(args: argparse.Namespace, repetition: int, network: Network) -> None:
    """Write the weights and the arguments that they came of to `--save_model`."""
    name = f"{args.trainer}_{args.network}_seed{args.seed}_repetition{repetition + 1}.pt"
    path = Path(args.save_model) / name
    try:
        with replacing(path) as partial:
            torch.save({"arguments": vars(args), "state_dict": network.state_dict()}, partial)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from None
