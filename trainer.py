"""Train one network, evaluate it, repeat over seeds, summarise; and the arguments of all that."""

import argparse
import inspect
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
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
from preprocessing import Parser, load_dataset, make_folder, need, number, replacing
from register import NETWORKS, TRAINERS, canonical_name


def training_parser(description: str) -> Parser:
    """The command line that every training shares."""
    parser = Parser(description)
    named = (TRAINERS | NETWORKS).items()
    own = [f"{name}: {str(cls.defaults)[1:-1]}" for name, cls in named if cls.defaults]
    parser.epilog = f"Defaults of their own: {'; '.join(own)}"
    add, seed, share = parser.add_argument, number(int, 0, 2**32 - 1), number(float, 0, 1)
    count, rate, amount = number(int, 1), number(float, 0, above=True), number(float, 0)
    add("--seed", type=seed, default=1234, help="seed of all random draws")
    add("--data_seed", type=seed, help="insist on data drawn with this seed")
    add("--trainer", default="ERM", help=f"one of {', '.join(TRAINERS)}, or one of --plugin's")
    add("--network", default="MLP", help=f"one of {', '.join(NETWORKS)}, or one of --plugin's")
    add("--plugin", metavar="FILE", help="Python file to run first, to register names of your own")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--grayscale", action="store_true", help="hide the colours: the oracle")
    add("--image_size", type=int, choices=(28, 14), default=28, help="pixels per side")
    add("--raw_pixels", action="store_true", help="images as value / 255, not normalised")
    moves = "training images are moved at random by up to so many pixels, 0 to 13"
    add("--shift", type=number(int, 0, 13), default=0, help=moves)
    units = "units of each hidden layer (MLP)"
    add("--hidden_dim", type=count, nargs="+", default=(64, 16), help=units)
    add("--bias", action="store_true", help="give the layers biases (MLP)")
    add("--batchnorm", action="store_true", help="normalise hidden layers over the minibatch (MLP)")
    dropped = "proportion of hidden units dropped, 0 to 0.99"
    add("--drop_rate", type=number(float, 0, 0.99), default=0.0, help=dropped)
    add("--init_scale", type=rate, default=1.0, help="factor of the first layer's initial weights")
    add("--batch_size", type=count, default=1024, help="images per minibatch")
    add("--iteration", type=count, default=400, help="minibatches per training")
    add("--learning_rate", type=rate, default=1e-3, help="step size of Adam")
    add("--epsilon", type=rate, default=1e-8, help="Adam adds it to the root of the second moment")
    add("--weight_decay", type=amount, default=0.0, help="L2 coefficient of Adam")
    norm = "longer gradients are shortened to this (Pascanu et al. 2013), 0: none are"
    add("--max_gradient_norm", type=amount, default=0.1, help=norm)
    last = "average the weights of this last part of the iterations, 0 to 1 (Izmailov et al. 2018)"
    add("--average_last", type=share, default=0.25, help=last)
    add("--evaluation_steps", type=count, default=20, help="iterations from log line to log line")
    held_out = "proportion of the training samples that is held out, 0 to 0.9"
    add("--validation", type=number(float, 0, 0.9), default=0.2, help=held_out)
    add("--repetitions", type=count, default=3, help="trainings, each with draws of its own")
    add("--eta", type=amount, default=0.05, help="step size of groupDRO's weights q")
    add("--reg_lambda", type=amount, default=50.0, help="weight of the penalty")
    squared = "IRM's estimate of a squared gradient (unbiased: Arjovsky et al. 2019, section 3.2)"
    add("--penalty", choices=("unbiased", "plain"), default="unbiased", help=squared)
    anneal = "IRM: iterations with weight 1; after them the objective is divided by reg_lambda"
    add("--anneal_iterations", type=number(int, 0), default=0, help=anneal)
    estimate = "Backdoor: log odds of each colour as an offset, or inverse propensities as weights"
    add("--adjustment", choices=("offset", "weights"), default="offset", help=estimate)
    add("--save_model", metavar="DIR", help="folder to save each repetition's network in")
    return parser


def parse_arguments(parser: Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse, run the plugin, look names up; the trainer's and the network's defaults apply."""
    args = parser.parse_args(arguments)
    try:
        if args.plugin:
            runpy.run_path(args.plugin)
    except OSError as error:
        parser.error(f"argument --plugin: cannot read {args.plugin}: {error.strerror}")
    try:
        trainer = canonical_name(TRAINERS, args.trainer)
        network = canonical_name(NETWORKS, args.network)
    except ValueError as error:
        parser.error(str(error))
    parser.set_defaults(**TRAINERS[trainer].defaults | NETWORKS[network].defaults)
    args = parser.parse_args(arguments)
    args.trainer, args.network = trainer, network
    if args.save_model:
        make_folder(Path(args.save_model))
    return args


def call(function: Callable, *arguments, options: dict):
    """Call a function or a class with those of the options that its other parameters ask for."""
    known = list(inspect.signature(function).parameters)[len(arguments) :]
    return function(*arguments, **{name: options[name] for name in known if name in options})


class Run(NamedTuple):
    """One repetition: what is trained, and on what."""

    number: int  # from 1
    network: Network
    train: Split
    validation: Split | None
    generator: torch.Generator  # orders the samples


class Repetition(NamedTuple):
    """One training and what came of it."""

    run: Run
    test: Split
    result: dict[str, float]
    flip_rate: float


def repetitions(
    args: argparse.Namespace, harden: Callable[[Run, dict], Network] | None = None
) -> Iterator[Repetition]:
    """Train and test as the arguments say, once per repetition, writing the log on the way.

    Args:
        args: from `parse_arguments`.
        harden: called with each run, its network trained, and the arguments as a dict; returns the
            network to test instead.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    print(f"Arguments: {vars(args)}")
    print(f"Device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    data = call(load_dataset, options=vars(args))
    print(f"Data: {data.description}", flush=True)
    all_train, validation, test = (
        digits and call(Split, digits, device, options=vars(args)) for digits in data[:3]
    )
    test = test.by_color()
    runs = [start(args, n + 1, all_train, validation) for n in range(args.repetitions)]
    loss = call(TRAINERS[args.trainer], options=vars(args))
    call(train, runs, loss, options=vars(args))
    for run in runs:
        print(f"Repetition {run.number} of {args.repetitions}")
        if harden is not None:
            run = run._replace(network=harden(run, vars(args)))
        logits, recolored = predict(run.network, test), predict(run.network, test, recolored=True)
        result = metrics(logits, test.labels[test.index])
        flips = ((logits > 0) != (recolored > 0)).double().mean().item()
        if args.save_model:
            save(args, run)
        print(f"Test result: {result}")
        print(f"Flip rate: {flips}", flush=True)
        yield Repetition(run, test, result, flips)


def start(args: argparse.Namespace, number: int, data: Split, validation: Split | None) -> Run:
    """A repetition with its own draws: which samples are held out, their order, first weights."""
    generator = torch.Generator().manual_seed(1000 * args.seed + number - 1)
    if validation is None and args.validation:
        data, validation = data.hold_out(args.validation, generator)
    # Initial weights and dropout are drawn by torch, which reads its global generator.
    torch.manual_seed(generator.initial_seed())
    channels = 1 if args.grayscale else 2
    options = vars(args) | {"inputs": channels * data.images.shape[1], "channels": channels}
    network = call(NETWORKS[args.network], options=options).to(data.images.device)
    network.scale_first_layer(args.init_scale)
    return Run(number, network, data, validation and validation.by_color(), generator)


def train(
    runs: Sequence[Run],
    loss: Loss,
    *,
    iteration: int = 400,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    max_gradient_norm: float = 0.0,
    average_last: float = 0.0,
    shift: int = 0,
    evaluation_steps: int = 20,
) -> None:
    """Minimise the loss with Adam, in place; leaves the networks in evaluation mode.

    The runs take each step together, as every operation costs time besides what it computes.

    Args:
        runs: their training data are parts of one split.
        loss: made for this training; called with the logits of all runs, (R, N).
        iteration: how many minibatches to train on.
        learning_rate, epsilon, weight_decay: of Adam (Kingma & Ba 2015; weight decay is L2).
        max_gradient_norm: a network's longer gradients are shortened to this norm (Pascanu et al.
            2013, "On the difficulty of training recurrent neural networks"). IRM's first gradients
            are tens of times as long as its later ones, and Adam's memory of them would shorten all
            steps that follow. 0 leaves gradients as they are.
        average_last: the networks get the mean of the weights after each of this proportion of the
            iterations, the last ones (Izmailov et al. 2018, "Averaging weights leads to wider
            optima and better generalization"); 0: the last weights.
        shift: pixels by which each image is moved at most, at random.
        evaluation_steps: iterations from one log line to the next.

    Raises:
        UserError: an objective or a weight is no longer finite, or an objective is not one number
            for each run.
    """
    # All weights in one matrix, a row for each network, whose own parameters become views of it.
    of_each = [[p for p in run.network.train().parameters() if p.requires_grad] for run in runs]
    parameters = [parameter for own in of_each for parameter in own]
    weights = torch.stack([parameters_to_vector(own) for own in of_each]).detach()
    for own, row in zip(of_each, weights, strict=True):
        vector_to_parameters(row, own)
    averaged = round(average_last * iteration)
    sum_of_weights, first, second = (torch.zeros_like(weights) for _ in range(3))
    adam_state = [first], [second], [], [weights.new_zeros(())]
    adam_settings = {"lr": learning_rate, "eps": epsilon, "beta1": 0.9, "beta2": 0.999}
    adam_settings |= {"fused": True, "amsgrad": False, "maximize": False}
    parts, generators = [run.train for run in runs], [run.generator for run in runs]
    batches = minibatches(parts, batch_size, generators, shift)
    progress = tqdm(range(1, iteration + 1), disable=None, leave=False)
    for step, batch in zip(progress, batches, strict=False):
        inputs = zip(runs, batch.images, batch.colors, strict=True)
        logits = torch.stack([run.network(images, colors) for run, images, colors in inputs])
        objectives = loss(logits, batch)
        shapes = f"{tuple(objectives.shape)} objectives for logits of {tuple(logits.shape)}"
        mixes = f"{type(loss).__name__} gives {shapes}: it is to reduce over the last dimension"
        need(objectives.shape == (len(runs),), mixes)
        objective = objectives.sum()
        require_finite(objective, "the objective", step)
        gradients = torch.autograd.grad(objective, parameters, materialize_grads=True)
        gradients = torch.cat([gradient.flatten() for gradient in gradients]).view_as(weights)
        if max_gradient_norm:
            norms = gradients.norm(dim=-1, keepdim=True)
            gradients *= (max_gradient_norm / norms).clamp(max=1)
        # The function behind torch.optim.Adam; the class spends a second importing a compiler.
        decay = weight_decay / loss.divisor
        adam([weights], [gradients], *adam_state, weight_decay=decay, **adam_settings)
        if step > iteration - averaged:
            sum_of_weights += weights
        if step % evaluation_steps == 0:
            for run, risks in zip(runs, loss.risks(logits.detach(), batch), strict=True):
                line = f"Repetition {run.number}, iteration {step}: "
                line += "loss of train1 {:.4f}, train2 {:.4f}".format(*risks)
                if run.validation is not None:
                    line += f"; validation {evaluate(run.network, run.validation)}"
                    run.network.train()
                print(line, flush=True)
    require_finite(weights, "a weight", iteration)
    trained = sum_of_weights / averaged if averaged else weights
    for run, own, row in zip(runs, of_each, trained, strict=True):
        vector_to_parameters(row.clone(), own)  # no memory shared between networks
        finish(run, averaged > 0)


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


def require_finite(values: Tensor, what: str, iteration: int) -> None:
    diverged = f"training diverged: {what} is nan or infinite at iteration {iteration}"
    need(values.isfinite().all(), f"{diverged}; lower --learning_rate, --reg_lambda or --eta")


@torch.no_grad()
def predict(network: Network, split: Split, recolored: bool = False) -> Tensor:
    """Logits (N,) of a whole split, with its digits in the other colour if `recolored`.

    They are computed where the network is: a crossbar's on the CPU.
    """
    network.eval()
    device = network.output_layer.device
    chunks = ((batch.images, batch.colors ^ recolored) for batch in split.chunks())
    return torch.cat([network(images.to(device), colors.to(device)) for images, colors in chunks])


def evaluate(network: Network, split: Split) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on a whole split."""
    logits = predict(network, split)
    return metrics(logits, split.labels[split.index].to(logits.device))


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean and population standard deviation of each metric over repetitions, as plain floats."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary |= {f"{name}_testmean": fmean(values), f"{name}_teststd": pstdev(values)}
    return summary


def save(args: argparse.Namespace, run: Run) -> None:
    """Write the weights and the arguments that they came of to `--save_model`."""
    name = f"{args.trainer}_{args.network}_seed{args.seed}_repetition{run.number}.pt"
    with replacing(Path(args.save_model) / name) as partial:
        torch.save({"arguments": vars(args), "state_dict": run.network.state_dict()}, partial)
