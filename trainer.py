"""Training, repetitions and their seeds, the summary, saved networks, and the flags."""

import argparse
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Batch, Dataset, Samples, check_integrity, load_data
from metric import metrics
from model import Loss, Network
from preprocessing import UserError, number, replacing, save, warn
from register import NETWORKS, TRAINERS

os.environ.setdefault("USER", "user")  # torch needs a user name, and a container may have none


def train(
    network: Network,
    loss: Loss,
    training: Samples,
    validation: Samples | None = None,
    *,
    iteration: int = 400,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    evaluation_steps: int = 100,
    report: Callable[[int], None] | None = None,
) -> Network:
    """Train a network in place with Adam and return it in evaluation mode.

    The defaults are the assignment's protocol. The network is moved to the device of the samples.

    Args:
        network: its `phi` is trained, its `output_layer` is not
        loss: the objective; its state, such as the q of groupDRO, changes during training
        training: samples to train on
        validation: samples for the metrics in the log; they do not change the training
        iteration: number of minibatches
        batch_size: samples per minibatch
        learning_rate: learning rate of Adam
        weight_decay: L2 coefficient of Adam
        evaluation_steps: iterations between two reports
        report: function called with the number of finished iterations; by default, a log line is
            printed (`print_progress`)

    Raises:
        UserError: the objective is not a finite scalar, or the loss has parameters
    """
    if list(loss.parameters()):
        raise UserError("A loss cannot have trainable parameters. Use register_buffer for state.")
    network.to(training.images.device).train()
    loss.to(training.images.device).train()
    optimizer = torch.optim.Adam(
        network.phi.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    batches = training.minibatches(batch_size)
    for step in tqdm(range(1, iteration + 1), disable=None, leave=False):  # None: in terminals only
        batch = next(batches)
        objective = loss(network, batch)
        if objective.shape != ():
            raise UserError(f"A loss must return a scalar, not shape {tuple(objective.shape)}.")
        network.zero_grad()  # the whole network, because the output layer gets gradients as well
        objective.backward()
        optimizer.step()
        if not objective.isfinite():
            raise UserError(
                f"The training diverged at iteration {step}. "
                "Lower --learning_rate or the weight of the loss (--reg_lambda, --eta)."
            )
        if step % evaluation_steps == 0:
            if report is None:
                print_progress(step, objective, network, loss, batch, validation)
            else:
                report(step)
            network.train()
    loss.eval()
    return network.eval()


@torch.no_grad()
def print_progress(
    step: int,
    objective: Tensor,
    network: Network,
    loss: Loss,
    batch: Batch,
    validation: Samples | None,
) -> None:
    """Print a log line: the objective of this step, then results of the updated network.

    The results are the risk of each environment in this minibatch and the validation metrics.
    """
    network.eval()  # without dropout, so that no random numbers are used
    risks = {0: "–", 1: "–"}  # a dash if the minibatch lacks the environment
    for e, risk in zip(loss.present(batch), loss.risks(network(batch.images), batch), strict=True):
        risks[e] = f"{risk:.4f}"
    line = f"Iteration {step}: objective {objective:.4f}; "
    line += f"loss of train1 {risks[0]}, train2 {risks[1]}"
    if validation is not None:
        line += f"; validation {evaluate(network, validation)}"
    tqdm.write(line)  # does not break the progress bar
    sys.stdout.flush()


@torch.no_grad()
def predict(network: Network, samples: Samples) -> Tensor:
    """Return the logits (N,) of samples, computed on the network's device.

    Raises:
        UserError: a logit is not finite
    """
    network.eval()
    device = network.output_layer.device
    logits = torch.cat([network(batch.images.to(device)) for batch in samples.chunks()])
    if not logits.isfinite().all():
        raise UserError("The network's logits are not finite. Lower --learning_rate.")
    return logits


def evaluate(network: Network, samples: Samples) -> dict[str, float]:
    """Return Accuracy, AUC and F1_macro on samples."""
    return metrics(predict(network, samples), samples.labels)


def start_log(args: argparse.Namespace) -> Dataset:
    """Print the head of the log. Load the data, onto the GPU if there is one.

    Raises:
        UserError: the data, the GPU or the folder of --save_model cannot be used
    """
    print(f"Arguments: {vars(args)}")
    data = load_data(args.dataset_path, args.seed)
    device = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available() and not args.no_cuda:
        torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, not in TF32
        torch.backends.cudnn.deterministic = True  # every run gives the same bits
        try:
            data = data.to("cuda")
            torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
            device = torch.cuda.get_device_name()
        except RuntimeError as error:  # the GPU is too old for this torch, or full
            reason = str(error).split("\n")[0]
            raise UserError(f"The GPU cannot be used ({reason}). Add --no_cuda.") from None
    print(f"Device: {device}, torch: {torch.__version__}")
    print(f"Data: {data.description}", flush=True)
    if args.save_model:  # refuse an unwritable folder before the training
        with replacing(model_path(args.save_model, 1)):
            pass
    if data.seed not in (None, args.seed):
        warn(
            f"the data were generated with seed {data.seed}, not with seed {args.seed}. "
            f"Pass --seed {data.seed}, or delete {data.folder} to generate new data."
        )
    return data


def train_repetitions(
    args: argparse.Namespace, data: Dataset
) -> Iterator[tuple[int, Network, Samples]]:
    """Train and save each repetition. Yield its number, its network and its training samples."""
    for repetition in range(1, args.repetitions + 1):
        print(f"Repetition {repetition} of {args.repetitions}")
        network, loss, training, _ = train_repetition(args, data, repetition)
        if args.save_model:
            save_model(model_path(args.save_model, repetition), args, network, loss)
        yield repetition, network, training


def train_repetition(
    args: argparse.Namespace,
    data: Dataset,
    repetition: int,
    report: Callable[[int], None] | None = None,
) -> tuple[Network, Loss, Samples, Samples | None]:
    """Train one repetition. Return its network, its loss, its training and validation samples."""
    seed_repetition(args, repetition)
    training, validation = data.hold_out(args.validation)
    network, loss = build(args)
    train(network, loss, training, validation, report=report, **arguments_of(train, args))
    return network, loss, training, validation


def seed_repetition(args: argparse.Namespace, repetition: int) -> None:
    """Seed torch for a repetition: its hold-out, its initial weights and its minibatches."""
    torch.manual_seed(1000 * args.seed + repetition - 1)


def build(args: argparse.Namespace) -> tuple[Network, Loss]:
    """Return the network, with initial weights, and the loss of the command line."""
    network, loss = NETWORKS[args.network], TRAINERS[args.trainer]
    return network(**arguments_of(network, args)), loss(**arguments_of(loss, args))


def arguments_of(function: Callable, args: argparse.Namespace) -> dict:
    """Select the arguments that `function` accepts, so that --eta reaches GroupDRO(eta).

    These are the keyword-only parameters of a function and all parameters of a class.
    """
    parameters = inspect.signature(function).parameters.values()
    return {
        each.name: getattr(args, each.name)
        for each in parameters
        if hasattr(args, each.name)
        and (inspect.isclass(function) or each.kind is each.KEYWORD_ONLY)
    }


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean and the population standard deviation of each metric over repetitions.

    Both are nan if a result is nan.
    """
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        mean = fmean(values)
        summary[f"{name}_testmean"] = mean
        summary[f"{name}_teststd"] = math.nan if math.isnan(mean) else pstdev(values)
    return summary


# Saved networks.


def model_path(folder: str | Path, repetition: int) -> Path:
    return Path(folder) / f"repetition{repetition}.pt"


def model_arguments(args: argparse.Namespace) -> dict:
    """Select the arguments that determine a network. They are saved with it."""
    names = ("trainer", "network", "seed", "repetitions", "validation")
    classes = NETWORKS[args.network], TRAINERS[args.trainer]
    arguments = {name: getattr(args, name) for name in names}
    for function in (train, *classes):
        arguments |= arguments_of(function, args)
    return arguments


def save_model(path: Path, args: argparse.Namespace, network: Network, loss: Loss) -> None:
    """Save a network with its loss and its arguments. Print the path."""
    saved = {
        "arguments": model_arguments(args),
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
        "loss": {name: tensor.cpu() for name, tensor in loss.state_dict().items()},
    }
    with replacing(path) as partial:
        save(saved, partial)
    print(f"Saved: {path}")


def load_model(path: str | Path) -> tuple[Network, Loss, argparse.Namespace]:
    """Load a saved network, on the CPU and in evaluation mode.

    Returns:
        the network, its loss and its arguments; arguments that the file lacks have their defaults

    Raises:
        UserError: the file cannot be read, or it is not a saved network
    """
    try:
        check_integrity(path)
        saved = torch.load(path, weights_only=True, map_location="cpu")
        args = training_parser().parse_args([])
        arguments = saved["arguments"]
        args.trainer, args.network = arguments["trainer"], arguments["network"]
        for name in model_arguments(args):
            setattr(args, name, arguments[name])
        args.seed, args.repetitions = int(args.seed), int(args.repetitions)
        args.validation = float(args.validation)
        network, loss = build(args)
        network.load_state_dict(saved["network"])
        loss.load_state_dict(saved["loss"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # an untrusted file can raise anything
        raise UserError(
            f"{path} is corrupt, or it is not a network that this version saved. "
            "Train it again with --save_model."
        ) from None
    return network.eval(), loss.eval(), args


# The flags.


def training_parser(description: str = "") -> argparse.ArgumentParser:
    """Return the parser of the flags. A flag reaches the parameters of the same name."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count, weight = parser.add_argument, number(int, 1), number(float, 0)
    add("--trainer", default="ERM", choices=TRAINERS, help="the loss")
    add("--network", default="MLP", choices=NETWORKS, help="the architecture")
    add("--seed", type=number(int, 0), default=1234, help="seed of the data and the repetitions")
    add("--repetitions", type=count, default=3, help="number of trainings, each with its own seed")
    add("--dataset_path", default="data", help="folder that contains ColoredMNIST")
    add(
        "--validation",
        type=number(float, 0, 0.9),
        default=0.2,
        help="fraction of training samples held out for the metrics in the log, 0 to 0.9",
    )
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add(
        "--save_model",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder to save the network of each repetition in",
    )

    add("--iteration", type=count, default=400, help="number of minibatches")
    add("--batch_size", type=count, default=1024, help="samples per minibatch")
    add("--learning_rate", type=weight, default=1e-3, help="learning rate of Adam")
    add("--weight_decay", type=weight, default=0.0, help="L2 coefficient of Adam")
    add("--evaluation_steps", type=count, default=100, help="iterations between two log lines")

    add("--grayscale", action="store_true", help="hide the colours, for comparison")
    add(
        "--hidden_dim",
        type=number(int, 1, 10**4),
        nargs="+",
        default=[64, 16],
        help="MLP: units of each hidden layer",
    )
    add("--bias", action="store_true", help="MLP: add biases to the layers")
    add(
        "--drop_rate",
        type=number(float, 0, 0.99),
        default=0.0,
        help="fraction of hidden units dropped during training, 0 to 0.99",
    )

    add("--eta", type=weight, default=0.05, help="groupDRO: step size η of the weights q")
    add("--reg_lambda", type=weight, default=50.0, help="IRM: weight λ of the penalty")
    add(
        "--adjustment",
        default="offset",
        choices=("offset", "weights"),
        help="Backdoor: add the log odds of each stratum to the logit, or balance its labels",
    )
    return parser


def warn_of_unused(args: argparse.Namespace) -> None:
    """Warn about changed flags that neither `train` nor the chosen classes accept."""
    used = {*model_arguments(args), "dataset_path", "no_cuda", "save_model"}
    defaults = vars(training_parser().parse_args([]))
    unused = [
        f"--{name}"
        for name, default in defaults.items()
        if name not in used and getattr(args, name) != default
    ]
    if unused:
        warn(
            f"{', '.join(unused)}: no effect, because "
            f"{args.trainer} and {args.network} have no such parameter."
        )
