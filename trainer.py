"""Train one network, the loop over seeds, test, save and load; and the flags of all that."""

import argparse
import inspect
import shlex
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from dataset import Batch, Dataset, Samples, check_sums, form_of_drawn, load_dataset
from metric import metrics
from model import Loss, Network
from preprocessing import P_E, P_F, SIZES, UserError, number, warn, written_whole
from register import NETWORKS, TRAINERS


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
    steady: bool = False,
    evaluation_steps: int = 100,
) -> Network:
    """Train a network in place by Adam, where the samples are; returns it in evaluation mode.

    The defaults are the assignment's protocol. Raises UserError if the objective isn't one finite
    number, or if the loss has weights of its own.

    Args:
        network: its `phi` is trained, its `output_layer` is not
        loss: what is minimised; its state, such as groupDRO's q, changes on the way
        training: samples to train on
        validation: samples for figures in the log, and for nothing else
        iteration: minibatches to train on
        batch_size: samples in a minibatch
        learning_rate: of Adam
        weight_decay: L2 coefficient of Adam
        steady: average the weights of the last quarter of the steps (after Izmailov et al. 2018,
            arXiv:1803.05407), and clip gradients to a norm of 0.1 (Pascanu et al. 2013,
            arXiv:1211.5063)
        evaluation_steps: iterations from log line to log line
    """
    if any(weights.requires_grad for weights in loss.parameters()):
        raise UserError("the loss has weights of its own, which would not be trained: use buffers")
    network.to(training.images.device).train()
    loss.to(training.images.device).train()
    optimizer = torch.optim.Adam(
        network.phi.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    average = AveragedModel(network) if steady else None
    batches = training.minibatches(batch_size)
    for step in tqdm(range(1, iteration + 1), disable=None, leave=False):  # None: in a terminal
        batch = next(batches)
        objective = loss(network, batch)
        if objective.shape != ():
            raise UserError(f"a loss is one number, and this one is {tuple(objective.shape)}")
        network.zero_grad()  # all of it, as the output layer gets gradients, too
        objective.backward()
        if steady:
            nn.utils.clip_grad_norm_(network.phi.parameters(), 0.1)
        optimizer.step()
        if steady and step > 0.75 * iteration:
            average.update_parameters(network)
        if not objective.isfinite():
            raise UserError(
                f"diverged at iteration {step}: lower --learning_rate or a weight of the loss "
                "(--reg_lambda, --eta); or a minibatch had too few samples for this loss"
            )
        if step % evaluation_steps == 0:
            report(step, objective, network, loss, batch, validation)
    if steady:
        network.load_state_dict(average.module.state_dict())
        update_bn(training.chunks(), network)  # for a network that has batch normalisation
    loss.eval()
    return network.eval()


@torch.no_grad()
def report(
    step: int,
    objective: Tensor,
    network: Network,
    loss: Loss,
    batch: Batch,
    validation: Samples | None,
) -> None:
    """The log's line: this step's objective, then figures of the network that it led to.

    These are each environment's loss in the same minibatch, and the metrics on the validation
    samples.
    """
    network.eval()  # so that this draws no random numbers of dropout
    shown = {0: "–", 1: "–"}  # for an environment that the minibatch lacks
    for e, risk in zip(loss.present(batch), loss.risks(network(batch.images), batch), strict=True):
        shown[e] = f"{risk:.4f}"
    losses = f"loss of train1 {shown[0]}, train2 {shown[1]}"
    line = f"Iteration {step}: objective {objective:.4f}; {losses}"
    if validation is not None:
        line += f"; validation {evaluate(network, validation)}"
    tqdm.write(line)  # print, but beside the progress bar
    sys.stdout.flush()
    network.train()


@torch.no_grad()
def predict(network: Network, samples: Samples) -> Tensor:
    """Logits (N,) of samples, one at least, computed where the network is: a crossbar's on the CPU.

    Raises UserError if one isn't finite.
    """
    network.eval()
    device = network.output_layer.device
    logits = torch.cat([network(batch.images.to(device)) for batch in samples.chunks()])
    if not logits.isfinite().all():
        raise UserError("a logit is nan or infinite: lower --learning_rate")
    return logits


def evaluate(network: Network, samples: Samples) -> dict[str, float]:
    """Accuracy, AUC and F1_macro on all samples, one at least."""
    return metrics(predict(network, samples), samples.labels)


def load(args: argparse.Namespace) -> Dataset:
    """Begin the log; the data, on the GPU if there is one and it may be used."""
    use_gpu = torch.cuda.is_available() and not args.no_cuda
    if use_gpu:
        torch.backends.cudnn.allow_tf32 = False  # float32 in convolutions, too
        torch.backends.cudnn.deterministic = True  # the same bits each time, there as well
    print(f"Arguments: {vars(args)}")
    device = torch.cuda.get_device_name() if use_gpu else f"CPU, threads: {torch.get_num_threads()}"
    print(f"Device: {device}, torch: {torch.__version__}")
    data = load_dataset(args.dataset_path, args.seed, "cuda" if use_gpu else "cpu")
    print(f"Data: {data.description}", flush=True)
    if args.save_model:  # what can't be written there is said now, not after the training
        name = file_name(args, args.repetitions, data.form)
        with written_whole(Path(args.save_model) / name) as partial:
            partial.touch()
            partial.unlink()
    if data.seed not in (None, args.seed):
        warn(
            f"seed {args.seed} trains on the data of seed {data.seed}, which stay as they were "
            "drawn at first; to draw the assignment's with this seed: "
            f"rm -r {shlex.quote(str(data.folder.resolve()))}"
        )
    return data


def repetitions(
    args: argparse.Namespace, data: Dataset
) -> Iterator[tuple[int, Network, Loss, Samples, Samples | None]]:
    """Yield each repetition's (repetition, network, loss, training, validation), untrained.

    Each sets a seed of its own, which decides what is held out, the initial weights and the order
    of the minibatches.
    """
    for repetition in range(1, args.repetitions + 1):
        torch.manual_seed(1000 * args.seed + repetition - 1)
        training, validation = data.hold_out(args.validation)
        network, loss = build(args)
        yield repetition, network, loss, training, validation


def build(args: argparse.Namespace) -> tuple[Network, Loss]:
    """The network, of weights drawn anew, and the loss that the command line asks for.

    A flag reaches a class by the parameter of its name: `--eta` is `GroupDRO(eta)`.
    """
    network, loss = NETWORKS[args.network], TRAINERS[args.trainer]
    return network(**arguments_of(network, args)), loss(**arguments_of(loss, args))


def arguments_of(function: Callable, args: argparse.Namespace) -> dict:
    """Those of the command line's arguments that a function or a class takes, by their names."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def training_settings(args: argparse.Namespace) -> dict:
    """Those of the command line's arguments that `train` takes.

    By hand, as its `network` and `validation` are not what the flags of these names are.
    """
    return {
        "iteration": args.iteration,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "steady": args.steady,
        "evaluation_steps": args.evaluation_steps,
    }


def save(
    args: argparse.Namespace, repetition: int, network: Network, loss: Loss, form: str
) -> None:
    """Write a trained network and all that it came from to the folder `--save_model`, if given.

    A dict of the arguments, the repetition, what the data are (`Dataset.form`), the network's
    state_dict and the loss's, on the CPU. The name of the file has every setting that is not the
    default, and a checksum of `form` if the data aren't those that the seed draws.
    """
    if not args.save_model:
        return
    saved = {
        "arguments": vars(args),
        "repetition": repetition,
        "data": form,
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
        "loss": {name: tensor.cpu() for name, tensor in loss.state_dict().items()},
    }
    path = Path(args.save_model) / file_name(args, repetition, form)
    with written_whole(path) as partial:
        torch.save(saved, partial)
    print(f"Saved: {path}")


def file_name(args: argparse.Namespace, repetition: int, form: str) -> str:
    """Such as IRM_MLP_reg_lambda-20.0_steady_seed1234_repetition1.pt."""
    words = [args.trainer, args.network]
    for name, value in settings_of_its_own(args).items():
        if isinstance(value, (list, tuple)):
            value = "-".join(map(str, value))
        words.append(name if value is True else f"{name}-{value}")
    drawn = {"p_f": P_F, "p_e": P_E, "sizes": SIZES, "shuffle_digits": False, "seed": args.seed}
    if form != form_of_drawn(drawn):
        words.append(f"data-{zlib.crc32(form.encode()):08x}")
    return "_".join([*words, f"seed{args.seed}", f"repetition{repetition}.pt"])


NAMED_ANYWAY = ("trainer", "network", "seed")  # in the name of a file
NO_OTHER_NETWORK = ("repetitions", "dataset_path", "no_cuda", "save_model", "evaluation_steps")
NO_SETTINGS = (*NAMED_ANYWAY, *NO_OTHER_NETWORK)


def settings_of_its_own(args: argparse.Namespace) -> dict:
    """The arguments that tell a trained network from that of the default flags."""
    settings, unused = {}, unused_flags(args)
    for name, default in {**default_arguments(), "harden": False}.items():
        value = getattr(args, name, default)
        if value != default and name not in NO_SETTINGS and name not in unused:
            settings[name] = value
    return settings


def default_arguments() -> dict:
    return vars(training_parser().parse_args([]))


def load_model(path: str | Path) -> tuple[Network, Loss]:
    """The network and the loss in a file of `--save_model`, on the CPU, in evaluation mode.

    UserError if it can't be used.
    """
    network, loss, _ = load_saved(path)
    return network, loss


def load_saved(path: str | Path) -> tuple[Network, Loss, dict]:
    """The same and what else is in the file: arguments, repetition and what the data were."""
    try:
        check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that torch did not write
            saved = torch.load(path, weights_only=True, map_location="cpu")
        arguments = default_arguments() | saved["arguments"]
        is_ours = (
            isinstance(saved["repetition"], int)
            and isinstance(saved["data"], str)
            and isinstance(arguments["seed"], int)
            and isinstance(arguments["trainer"], str)
            and isinstance(arguments["network"], str)
            and isinstance(arguments["dataset_path"], str)
            and 0 <= arguments["validation"] <= 0.9
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # whatever a stranger's bytes may provoke
        is_ours = False
    if not is_ours:
        raise UserError(f"{path} is damaged, or no network that --save_model wrote")
    args = argparse.Namespace(**arguments)
    if args.trainer not in TRAINERS or args.network not in NETWORKS:
        raise UserError(f"{path}: register.py has no {args.trainer}, or no {args.network}")
    try:
        network, loss = build(args)
        network.load_state_dict(saved["network"])
        loss.load_state_dict(saved["loss"])
    except Exception:
        raise UserError(f"{path} does not fit {args.trainer} and {args.network} here") from None
    if not all(weights.isfinite().all() for weights in network.parameters()):
        raise UserError(f"{path} has weights that are nan or infinite")
    saved["arguments"] = args
    return network.eval(), loss.eval(), saved


class Watched(Loss):
    """A loss for `train` that calls `note(steps)` after 0, `every`, 2 `every`, ... steps.

    `note` can evaluate the network, say. The training is the same, bit for bit, as long as `note`
    draws no random numbers of torch.

    Args:
        loss: what is minimised
        every: steps from call to call
        note: gets the number of steps done so far
    """

    def __init__(self, loss: Loss, every: int, note: Callable[[int], object]):
        super().__init__()
        self.loss = loss
        self.every = every
        self.note = note
        self.steps = 0

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.loss.losses(logits, batch)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        if self.training:
            if self.steps % self.every == 0:
                self.note(self.steps)
                network.train()  # as `evaluate` leaves it in evaluation mode
            self.steps += 1
        return self.loss(network, batch)


def training_parser(description: str = "") -> argparse.ArgumentParser:
    """All flags of a training; the defaults are the assignment's protocol.

    They stand in `train` and in the classes of model.py, too; a test compares them.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # Above these bounds int64 or float32 would overflow within a step.
    count, amount = number(int, 1, 10**9), number(float, 0, 1e30)
    add("--trainer", default="ERM", choices=TRAINERS, help="the objective")
    add("--network", default="MLP", choices=NETWORKS, help="the architecture")
    seed = "seed of the repetitions, and of the data if they are drawn now"
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help=seed)
    add("--repetitions", type=count, default=3, help="trainings, each with its own draws")
    path = "folder that contains ColoredMNIST"
    add("--dataset_path", type=lambda text: str(Path(text)), default="data", help=path)
    validation = "proportion of the training samples held out for the log, 0 to 0.9"
    add("--validation", type=number(float, 0, 0.9), default=0.2, help=validation)
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--save_model", metavar="DIR", help="folder to save each repetition's network in")

    add("--iteration", type=count, default=400, help="minibatches to train on")
    add("--batch_size", type=count, default=1024, help="samples in a minibatch")
    add("--learning_rate", type=number(float, 0, 1e30, above=True), default=1e-3, help="of Adam")
    add("--weight_decay", type=amount, default=0.0, help="L2 coefficient of Adam")
    steady = "average the weights of the last quarter, and clip gradients to a norm of 0.1"
    add("--steady", action="store_true", help=steady)
    add("--evaluation_steps", type=count, default=100, help="iterations from log line to log line")

    add("--grayscale", action="store_true", help="hide the colours: the oracle to compare with")
    units = number(int, 1, 10**4)
    add("--hidden_dim", type=units, nargs="+", default=[64, 16], help="MLP: units of hidden layers")
    add("--bias", action="store_true", help="MLP: give the layers biases")
    drop_rate = "proportion of hidden units dropped while training, 0 to 0.99"
    add("--drop_rate", type=number(float, 0, 0.99), default=0.0, help=drop_rate)

    add("--eta", type=amount, default=0.05, help="groupDRO: step size η of the weights q")
    reg_lambda = "IRM: weight λ of the penalty; from a few hundred up, logits stay near 0"
    add("--reg_lambda", type=amount, default=50.0, help=reg_lambda)
    adjustment = "Backdoor: fit with the log odds of each stratum, or balance labels in each"
    add("--adjustment", default="offset", choices=("offset", "weights"), help=adjustment)
    return parser


def parse_arguments(
    description: str = "", arguments: list[str] | None = None
) -> argparse.Namespace:
    """The arguments of a command line that trains; says which of them have no effect."""
    args = training_parser(description).parse_args(arguments)
    warn_of_unused(args)
    return args


def parameters_of(*functions: Callable) -> set[str]:
    """The names of all their parameters."""
    return {name for made in functions for name in inspect.signature(made).parameters}


def unused_flags(args: argparse.Namespace) -> set[str]:
    """The flags of other trainers and networks than the chosen ones."""
    of_any = parameters_of(*TRAINERS.values(), *NETWORKS.values())
    used = parameters_of(train, TRAINERS[args.trainer], NETWORKS[args.network])
    unused = of_any - used - set(NO_SETTINGS)
    return {name for name in unused if hasattr(args, name)}  # other parameters have no flag


def warn_of_unused(args: argparse.Namespace) -> None:
    """Say which flags have no effect; UserError if one is given that can never have any."""
    defaults = default_arguments()
    parameters = parameters_of(train, *TRAINERS.values(), *NETWORKS.values())
    parameters.update(NO_SETTINGS)
    for name in defaults:
        if name not in parameters and getattr(args, name) != defaults[name]:
            raise UserError(f"--{name} has no effect: no trainer and no network has that parameter")
    changed = [name for name in sorted(unused_flags(args)) if getattr(args, name) != defaults[name]]
    if changed:
        flags = ", ".join(f"--{name}" for name in changed)
        warn(f"{flags}: {args.trainer} and {args.network} have no such setting; it changes nothing")
