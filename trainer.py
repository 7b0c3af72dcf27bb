"""Train one network and test it; and the command line of all that."""

import argparse
import functools
import inspect
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.adam import adam
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from dataset import Dataset, Digits, load_dataset
from metric import metrics
from model import Amount, Count, Loss, Network, Positive
from preprocessing import UserError, number, refuse, written_whole
from register import NETWORKS, TRAINERS

Proportion = Annotated[float, number(float, 0, 1)]
DIVERGED = "training diverged: {} is nan or infinite at iteration {}; lower --learning_rate"


def train(
    network: Network,
    loss: Loss,
    training: Digits,
    validation: Digits | None,
    *,
    iteration: Count = 400,
    batch_size: Count = 1024,
    learning_rate: Positive = 1e-3,
    weight_decay: Amount = 0.0,
    max_gradient_norm: Amount = 0.1,
    average_last: Proportion = 0.25,
    shift: Annotated[int, number(int, 0, 13)] = 1,
    evaluation_steps: Count = 100,
) -> Network:
    """Minimise the loss with Adam; returns the trained network, in evaluation mode.

    The network given is trained in place, the one returned has averaged weights. A loss may keep
    state, so it is made for one training. `validation` is for the log alone.

    Args:
        iteration: minibatches per training
        batch_size: images per minibatch
        learning_rate: step size of Adam
        weight_decay: L2 coefficient of Adam
        max_gradient_norm: longer gradients are shortened to this (Pascanu et al. 2013), as Adam
            would remember IRM's first ones, tens of times as long as later ones; 0: none are
        average_last: average the weights after this last part of the iterations, 0 to 1 (Izmailov
            et al. 2018); 0: the last weights
        shift: minibatches are moved at random by up to so many pixels, 0 to 13
        evaluation_steps: iterations from log line to log line

    Raises UserError if the objective or a weight is no longer finite.
    """
    optimizer = Adam(network, learning_rate, weight_decay)
    average = AveragedModel(network)
    first_averaged = min(iteration, iteration - round(average_last * iteration) + 1)
    network.train()
    batches = training.minibatches(batch_size, shift)
    for step in tqdm(range(1, iteration + 1), disable=None, leave=False):
        batch = next(batches)
        logits = network(batch.images)
        objective = loss(logits, batch)
        network.zero_grad()
        objective.backward()
        if max_gradient_norm:
            clip_grad_norm_(network.parameters(), max_gradient_norm)
        optimizer.step()
        if step >= first_averaged:
            average.update_parameters(network)
        refuse(not objective.isfinite(), DIVERGED.format("the objective", step))
        if step % evaluation_steps == 0:
            risks = "train1 {:.4f}, train2 {:.4f}".format(*loss.risks(logits.detach(), batch))
            line = f"Iteration {step}: objective {objective:.4f}; loss of {risks}"
            if validation is not None:
                line += f"; validation {evaluate(network, validation)}"
                network.train()
            print(line, flush=True)
    finite = all(parameter.isfinite().all() for parameter in network.parameters())
    refuse(not finite, DIVERGED.format("a weight", iteration))
    if average_last:
        update_bn((batch.images for batch in training.chunks()), average.module)
    return average.module.eval()


class Adam:
    """torch.optim.Adam by its function, as the class imports a compiler: 0.7 s and 110 MiB.

    Kingma & Ba 2015, weight decay as L2.
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.moments = [[torch.zeros_like(p) for p in self.parameters] for _ in range(2)]
        self.steps = [p.new_zeros(()) for p in self.parameters]
        self.settings = {"lr": learning_rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        self.settings |= {"weight_decay": weight_decay, "amsgrad": False, "maximize": False}

    @torch.no_grad()
    def step(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        adam(self.parameters, gradients, *self.moments, [], self.steps, fused=True, **self.settings)


@torch.no_grad()
def predict(network: nn.Module, digits: Digits) -> Tensor:
    """Logits (N,) of all digits, computed where the network is: a crossbar's on the CPU."""
    network.eval()
    device = network.output_layer.device
    return torch.cat([network(batch.images.to(device)) for batch in digits.chunks()])


def evaluate(network: nn.Module, digits: Digits) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on all digits."""
    return metrics(predict(network, digits), digits.labels)


def save(network: nn.Module, args: argparse.Namespace, repetition: int, kind: str = "") -> None:
    """Write the weights, and the arguments that they came of, to `--save_model`."""
    name = f"{args.trainer}_{args.network}{kind}_seed{args.seed}_repetition{repetition}.pt"
    with written_whole(Path(args.save_model) / name) as partial:
        torch.save({"arguments": vars(args), "state_dict": network.state_dict()}, partial)


def load(args: argparse.Namespace) -> Dataset:
    """The data on the GPU, if there is one and it may be used; begins the log."""
    try:
        Path(args.save_model or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_model: {args.save_model}: {error.strerror}") from None
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    print(f"Arguments: {vars(args)}")
    print(f"Device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    data = load_dataset(args.dataset_path, args.seed).to(device, args.grayscale)
    print(f"Data: {data.description}", flush=True)
    return data


def train_repetition(args: argparse.Namespace, data: Dataset, repetition: int) -> tuple:
    """One repetition of exp-mnist.py up to its test, for what goes on from there.

    Returns the trained network, its loss, and the digits of training and of validation.
    """
    network, loss = NETWORKS[args.network], TRAINERS[args.trainer]
    torch.manual_seed(1000 * args.seed + repetition - 1)
    training, validation = data.hold_out(args.validation)
    network = network(channels=1 if args.grayscale else 2, **arguments_of(network, args))
    network, loss = network.to(training.images.device), loss(**arguments_of(loss, args))
    trained = train(network, loss, training, validation, **arguments_of(train, args))
    return trained, loss, training, validation


def arguments_of(function: Callable, args: argparse.Namespace) -> dict:
    """Those of the command line's arguments that a function or a class has a default for."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.default is not p.empty and hasattr(args, p.name)]
    return {name: getattr(args, name) for name in names}


def parse_arguments(
    description: str, arguments: list[str] | None = None, of: Sequence[Callable] = (), **switches
) -> argparse.Namespace:
    """Parse a command line that trains.

    Flags are made from the signatures of `train`, of the losses and the networks (also a plugin's),
    and of the functions `of`; `switches` are flags without a value, and their help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--plugin", metavar="FILE", help="Python file to run first, see README.md")
    first.add_argument("--trainer", default="ERM", help=f"{', '.join(TRAINERS)}, or a plugin's")
    first.add_argument("--network", default="MLP", help=f"{', '.join(NETWORKS)}, or a plugin's")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.plugin:
        run_plugin(chosen.plugin)
    parser = argparse.ArgumentParser(
        description=description,
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    classes = TRAINERS | NETWORKS
    names = {name.lower(): name for name in classes}
    trainer, network = (names.get(n.lower(), n) for n in (chosen.trainer, chosen.network))
    for name, table in ((trainer, TRAINERS), (network, NETWORKS)):
        if name not in table:
            parser.error(f"unknown name {name!r}: choose from {', '.join(table)}")
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="seed of all random draws")
    add("--repetitions", type=number(int, 1), default=3, help="trainings, each with its own draws")
    add("--dataset_path", default="./data", help="folder of the folder ColoredMNIST")
    held_out = "proportion of the training samples that is held out, 0 to 0.9"
    add("--validation", type=number(float, 0, 0.9), default=0.2, help=held_out)
    add("--grayscale", action="store_true", help="hide the colours: the oracle")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--save_model", metavar="DIR", help="folder to save each repetition's network in")
    for name, text in switches.items():
        add(f"--{name}", action="store_true", help=text)
    for name in flags_of(classes[trainer]).keys() & flags_of(classes[network]).keys():
        parser.error(f"{trainer} and {network} both have an argument called {name}: rename one")
    of_classes = {}  # those of all, for --help and ./run.sh; the chosen ones' count
    for cls in (*classes.values(), classes[network], classes[trainer]):
        of_classes |= flags_of(cls)
    for flags in (*map(flags_of, (train, *of)), of_classes):
        for name, options in flags.items():
            try:
                add(f"--{name}", **options)
            except argparse.ArgumentError:
                parser.error(f"a plugin's argument is called {name}, as a flag is: rename it")
    own = [f"{name}: {str(cls.defaults)[1:-1]}" for name, cls in classes.items() if cls.defaults]
    parser.epilog = f"Defaults of their own: {'; '.join(own)}"
    parser.set_defaults(**classes[trainer].defaults | classes[network].defaults)
    args = parser.parse_args(arguments)
    args.trainer, args.network = trainer, network
    return args


@functools.cache
def run_plugin(path: str) -> None:
    """Run a Python file that adds to TRAINERS or NETWORKS, once; UserError if there is none."""
    refuse(not Path(path).is_file(), f"--plugin: there is no file {path}")
    runpy.run_path(path)


def flags_of(function: Callable) -> dict[str, dict]:
    """A flag's options for each argument of a function or a class that has a default.

    Its type, or what parses and checks it, is in the annotation, its help in the docstring.
    """
    text = inspect.getdoc(function) or ""
    helps = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", text, re.M))
    flags = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default, hint = parameter.default, parameter.annotation
        if default is parameter.empty or name == "channels":  # what --grayscale decides
            continue
        kind = hint if hint in (int, float, str) else type(default)
        options = {"type": kind, "default": default}
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction if default else "store_true"
            options = {"action": action, "default": default}
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif get_origin(hint) is Annotated:
            options["type"] = hint.__metadata__[0]
            if isinstance(default, tuple):
                options["nargs"] = "+" if ... in get_args(hint.__origin__) else len(default)
        described = " ".join(helps.get(name, f"of {function.__name__}").split())
        flags[name] = options | {"help": described.replace("%", "%%")}
    return flags
