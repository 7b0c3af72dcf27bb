"""What the scripts beside this one share: sweeps of jobs, trained networks, unseen digits, figures.

A sweep's jobs run on all cores, one thread each, or on the workers of a Dask cluster. Each result
is kept in data/jobs, so that a sweep that was interrupted goes on where it stopped; deleting that
folder starts afresh. Results of other code (the top level's, this module's or the script's own) are
not used.
"""

import argparse
import ast
import functools
import hashlib
import importlib
import inspect
import io
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from joblib import Memory, Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import Dataset, Digits, load_dataset  # noqa: E402
from preprocessing import (  # noqa: E402
    P_E,
    P_F,
    UserError,
    color_digits,
    draw_environments,
    load_mnist,
    refuse,
    written_whole,
)
from trainer import arguments_of, build, parse_arguments, train  # noqa: E402

UNSEEN_SEED = 10000  # the first that is no student number
LOCK = threading.Lock()  # torch's random numbers are the process's, and Dask's workers have threads


def logic(source: str) -> bytes:
    """Python code without what no result depends on: comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree).encode()


# The top level's code as this process has it.
CODE = b"".join(logic(path.read_text("utf-8")) for path in sorted(ROOT.glob("*.py")))


def run_jobs(
    function: Callable, jobs: list[tuple], scheduler: str | None = None
) -> Iterator[tuple[tuple, object]]:
    """Yield each job and `function(*job)`, as they finish; first those that are kept already.

    Args:
        function: of a script's top level; what it prints is dropped.
        jobs: tuples of numbers, strings and tuples, as what the function returns should be.
        scheduler: address of a Dask cluster, whose workers then do the work.
    """
    path, finished, missing = Path(inspect.getfile(function)), [], []
    for job in jobs:
        key = (path.stem, function.__name__, version(function, *plugins(job)), repr(job))
        try:
            finished.append((job, kept(*key)))
        except LookupError:
            missing.append((key, job))
    yield from finished
    if not missing:
        return
    with (
        workers(len(missing), scheduler, path.parent) as parallel,
        tqdm(total=len(jobs), initial=len(finished), smoothing=0, leave=False) as bar,
    ):
        # A lambda travels by value: Dask's scheduler, which reads it, can't import this module.
        send = delayed(lambda *pair: importlib.import_module("jobs").perform(*pair))
        for key, job, result in parallel(send(*pair) for pair in missing):
            kept(*key, result)
            bar.update()
            yield job, result


def add_scheduler_flag(parser: argparse.ArgumentParser) -> None:
    address = "compute on the workers of this Dask cluster instead of this machine's cores"
    parser.add_argument("--scheduler", metavar="tcp://HOST:8786", help=address)


def refuse_flags(options: list[str], *names: str) -> None:
    """UserError if `options`, meant for exp-mnist.py, have flags that the script sets itself."""
    ours = {f"--{name}" for name in names} & {word.split("=")[0] for word in options}
    refuse(ours, f"{', '.join(sorted(ours))}: that is what each job sets itself")


def kept(*arguments: object) -> object:
    """The result kept under this key; LookupError if there is none. One more argument is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow disks, and of files that can't be read
        return MEMORY(*arguments)


def remember(module: str, name: str, code: str, job: str, result: object = None) -> object:
    """What joblib's Memory calls where it has nothing: `result` is no part of the key."""
    if result is None:
        raise LookupError
    return result


MEMORY = Memory(ROOT / "data" / "jobs", verbose=0).cache(remember, ignore=["result"])


def plugins(job: tuple) -> list[str]:
    """The Python files that a job's arguments name."""
    words = [word for part in job for word in (part if isinstance(part, tuple) else (part,))]
    files = [word.split("=")[-1] for word in words if isinstance(word, str)]
    return [file for file in files if file.endswith(".py") and os.path.isfile(file)]


@functools.cache
def version(function: Callable, *files: str) -> str:
    """Of the code that a function's results depend on, as this process came to know it."""
    files_of = dict.fromkeys(map(inspect.getfile, (function, experiment)))
    sources = [logic(Path(path).read_text("utf-8")) for path in files_of]
    sources += [CODE, torch.__version__.encode(), *(Path(file).read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def perform(key: tuple[str, str, str, str], job: tuple) -> tuple:
    """Do a job in a worker; the function travels as its name, as a worker has no __main__ of ours.

    Raises UserError if this process has read other code than the one that asks.
    """
    module, name, code, _ = key
    with LOCK, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")  # whatever a job before it died of
        function = getattr(importlib.import_module(module), name)
        if version(function, *plugins(job)) != code:
            raise UserError("a worker runs another version of the code: start the workers again")
        return key, job, function(*job)


@contextmanager
def workers(jobs: int, scheduler: str | None, folder: Path) -> Iterator[Parallel]:
    """This machine's cores, or a Dask cluster, whose workers find modules in `folder`, too.

    Raises UserError if the cluster can't be reached, has no worker or breaks down.
    """
    options = {"n_jobs": min(cpu_count(), jobs), "batch_size": 1, "pre_dispatch": "all"}
    options["return_as"] = "generator_unordered"
    if scheduler is None:
        # What workers leave behind that are stopped by another one's error is cleaned up silently.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        # Workers whose sweep was killed go when they have nothing to do for 20 seconds.
        with parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=20):
            parallel = Parallel(**options)
        yield parallel
        return
    try:
        from distributed import Client

        with Client(scheduler, timeout=10) as client:
            folders = [str(ROOT), str(ROOT / "benchmarks"), str(folder)]
            # Also for workers that come later.
            client.register_worker_callbacks(lambda: sys.path.extend(folders))
            with parallel_config("dask", client=client):
                parallel = Parallel(**options)
            yield parallel
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).split(". ")[0]  # what follows is advice for programmers
        raise UserError(f"--scheduler {scheduler}: {reason}") from None


def experiment(
    arguments: list[str], drawing: dict | None = None, only: int | None = None
) -> Iterator[tuple]:
    """Yield (data, network, loss, training, validation) for each repetition, on the CPU.

    Args:
        arguments: as those of exp-mnist.py; the seed draws the data as well.
        drawing: more arguments of `preprocessing.draw_environments`.
        only: the one repetition that is wanted.
    """
    args = parse_arguments("", ["--evaluation_steps", "1000000", *arguments])
    data = fresh_data(args, drawing)
    for repetition in [only] if only else range(1, args.repetitions + 1):
        torch.manual_seed(1000 * args.seed + repetition - 1)
        training, validation = data.hold_out(args.validation)
        network, loss = build(args)
        network = train(network, loss, training, validation, **arguments_of(train, args))
        yield data, network, loss, training, validation


def fresh_data(args: argparse.Namespace, drawing: dict | None = None) -> Dataset:
    """What `--seed` draws, on the CPU; its files are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        draw_environments(Path(folder), seed=args.seed, **drawing or {})
        return load_dataset(folder, args.seed, args.grayscale)


@functools.cache
def unseen_digits(grayscale: bool = False) -> Digits:
    """A test environment of MNIST's own 10,000 test digits, always the same.

    Nothing is trained on it, and nothing may be chosen by it.
    """
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    drawn = color_digits(*load_mnist("test"), P_F, P_E[2], generator)
    images, labels, colors = drawn["images"][:, :2].contiguous(), drawn["labels"], drawn["colors"]
    digits = Digits(images, labels.float(), colors.long(), torch.full((len(labels),), 2))
    return digits.grayscale() if grayscale else digits


def save_figure(figure, path: str | Path) -> None:
    """Save a matplotlib figure as a PNG; the folder is made if it is missing."""
    with written_whole(Path(path)) as partial:
        figure.savefig(partial, format="png", dpi=120)
    print(f"Figure: {path}")
