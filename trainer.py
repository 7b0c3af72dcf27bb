"""Train one network and test it; and the command line of all that."""

import argparse
import functools
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from dataset import Dataset, Digits, load_dataset
from metric import metrics
from model import Loss, Network
from preprocessing import Amount, Count, Positive, Proportion, flags, number, refuse, written_whole
from register import NETWORKS, TRAINERS

run_plugin = functools.cache(runpy.run_path)  # each file once


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
    epsilon: Positive = 1e-4,
    max_gradient_norm: Amount = 0.1,
    average_last: Proportion = 0.25,
    shift: Annotated[int, number(int, 0, 13)] = 1,
    evaluation_steps: Count = 100,
) -> Network:
    """Train a network in place by Adam; returns a copy with averaged weights, in evaluation mode.

    `validation` is for the log alone. Raises UserError if the objective is no longer finite.

    Args:
        iteration: minibatches per training
        batch_size: images per minibatch
        learning_rate: step size of Adam
        weight_decay: L2 coefficient of Adam
        epsilon: of Adam (with torch's own, 1e-8, more hidden units end up inactive on every image)
        max_gradient_norm: longer gradients are shortened to this (Pascanu et al. 2013); 0: none are
        average_last: last part of the steps, 0 to 1, to average weights of (Izmailov et al. 2018)
        shift: minibatches are moved at random by up to so many pixels, 0 to 13
        evaluation_steps: iterations from log line to log line
    """
    network.to(training.images.device)
    settings = {"eps": epsilon, "weight_decay": weight_decay, "fused": True}
    optimizer = Adam(network.parameters(), learning_rate, **settings)
    average = AveragedModel(network)  # running mean of the last weights, which is returned
    precision = torch.get_float32_matmul_precision()
    first_averaged = min(iteration, iteration - round(average_last * iteration) + 1)
    steps = tqdm(range(1, iteration + 1), disable=None, leave=False)
    for step, batch in zip(steps, training.minibatches(batch_size, shift), strict=False):
        network.train()
        try:
            torch.set_float32_matmul_precision("medium")  # products of bfloat16 (on a GPU TF32)
            logits = network(batch.images)
            objective = loss(logits, batch)
            network.zero_grad()
            objective.backward()
        finally:
            torch.set_float32_matmul_precision(precision)
        if max_gradient_norm:  # Adam would long remember IRM's first gradients
            nn.utils.clip_grad_norm_(network.parameters(), max_gradient_norm)
        optimizer.step()
        if step >= first_averaged:
            average.update_parameters(network)
        refuse(not objective.isfinite(), f"diverged at iteration {step}: lower --learning_rate")
        if step % evaluation_steps == 0:
            risks = "train1 {:.4f}, train2 {:.4f}".format(*loss.risks(logits.detach(), batch))
            more = f"; validation {evaluate(network, validation)}" if validation else ""
            print(f"Iteration {step}: objective {objective:.4f}; loss of {risks}{more}", flush=True)
    update_bn(training.chunks(), average.module)
    return average.module.eval()


class Adam(torch.optim.Adam):
    """torch's own, without the wrappers that import a compiler for 0.7 s and 110 MiB."""

    add_param_group = torch.optim.Adam.add_param_group.__wrapped__
    step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)


@torch.no_grad()
def predict(network: nn.Module, digits: Digits) -> Tensor:
    """Logits (N,) of all digits, computed where the network is: a crossbar's on the CPU."""
    network.eval()
    device = network.output_layer.device
    logits = torch.cat([network(batch.images.to(device)) for batch in digits.chunks()])
    refuse(not logits.isfinite().all(), "a logit is nan or infinite; lower --learning_rate")
    return logits


def evaluate(network: nn.Module, digits: Digits) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on all digits."""
    return metrics(predict(network, digits), digits.labels)


def save(network: nn.Module, args: argparse.Namespace, repetition: int, kind: str = "") -> None:
    """Write the weights, and the arguments that they came from, to `--save_model`, if given."""
    name = f"{args.trainer}_{args.network}{kind}_seed{args.seed}_repetition{repetition}.pt"
    if args.save_model:
        with written_whole(Path(args.save_model) / name) as partial:
            torch.save({"arguments": vars(args), "state_dict": network.state_dict()}, partial)


def load(args: argparse.Namespace) -> Dataset:
    """Begin the log; the data, on the GPU if there is one and it may be used."""
    if args.save_model:  # what can't be written there is said now, not after the training
        with written_whole(Path(args.save_model) / "network") as partial:
            TemporaryFile(dir=partial.parent).close()
    device = "cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu"
    print(f"Arguments: {vars(args)}")
    print(f"Device: {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    data = load_dataset(args.dataset_path, args.seed, args.grayscale, device)
    print(f"Data: {data.description}", flush=True)
    return data


def build(args: argparse.Namespace) -> tuple[Network, Loss]:
    """The network, of weights drawn anew, and the loss that the command line asks for."""
    make_network, make_loss = NETWORKS[args.network], TRAINERS[args.trainer]
    network = make_network(channels=1 if args.grayscale else 2, **arguments_of(make_network, args))
    return network, make_loss(**arguments_of(make_loss, args))


def arguments_of(function: Callable, args: argparse.Namespace) -> dict:
    """Those of the command line's arguments that a function or a class has a default for."""
    return {name: getattr(args, name) for name, _ in flags(function) if name in args}


def parse_arguments(
    description: str, arguments: list[str] | None = None, functions: Sequence = (), **switches
) -> argparse.Namespace:
    """Parse a command line that trains; `switches` are flags without a value, and their help.

    Others are made from the signatures of `train`, `functions`, and all losses and networks.
    """
    options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=description, add_help=False, **options)
    add = parser.add_argument
    add("--plugin", metavar="FILE", help="Python file to run first, see README.md")
    plugin = parser.parse_known_args(arguments)[0].plugin
    if plugin:
        refuse(not Path(plugin).is_file(), f"--plugin: there is no file {plugin}")
        run_plugin(plugin)
    add("--trainer", default="ERM", choices=TRAINERS, help="or a plugin's")
    add("--network", default="MLP", choices=NETWORKS, help="or a plugin's")
    chosen, _ = parser.parse_known_args(arguments)
    trainer, network = TRAINERS[chosen.trainer], NETWORKS[chosen.network]
    classes = TRAINERS | NETWORKS
    add("-h", "--help", action="help", help="show this and exit")  # now that they are known
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="seed of all random draws")
    add("--repetitions", type=number(int, 1), default=3, help="trainings, each with its own draws")
    add("--dataset_path", default="./data", help="folder of the folder ColoredMNIST")
    add("--validation", type=number(float, 0, 0.9), default=0.2, help="part held out, 0 to 0.9")
    add("--grayscale", action="store_true", help="hide the colours: the oracle")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--save_model", metavar="DIR", help="folder to save each repetition's network in")
    for name, text in switches.items():
        add(f"--{name}", action="store_true", help=text)
    used = (train, *functions, trainer, network)  # the others' flags: for --help, and for ./run.sh
    for function in dict.fromkeys((*used, *classes.values())):
        for name, options in flags(function):
            try:
                add(f"--{name}", **options)
            except argparse.ArgumentError:
                if function in used:
                    parser.error(f"two arguments are called {name}: rename the plugin's")
    own = [f"{name}: {str(cls.defaults)[1:-1]}" for name, cls in classes.items() if cls.defaults]
    parser.epilog = f"Defaults of their own (a network's count): {'; '.join(own)}"
    parser.set_defaults(**trainer.defaults | network.defaults)
    return parser.parse_args(arguments)
