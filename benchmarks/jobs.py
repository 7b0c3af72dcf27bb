"""What the scripts beside this one share: sweeps of jobs, trained networks, tables, figures.

A sweep's jobs run on all cores, one thread each, or on the workers of a Dask cluster. Each result
is kept in data/jobs, so that a sweep that was interrupted goes on where it stopped; deleting that
folder starts afresh. Results of other code (the top level's, this module's or the script's own) are
not used.
"""

import argparse
import ast
import csv
import functools
import hashlib
import importlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from joblib import Memory, Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import Dataset, Samples, load_dataset  # noqa: E402
from model import Loss, Network  # noqa: E402
from preprocessing import UserError, draw_environments, written_whole  # noqa: E402
from trainer import repetitions, train, training_parser, training_settings  # noqa: E402

OUTPUT = ROOT / "data" / "figures"  # git ignores it: no run replaces a figure of the project's
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


def project_globals() -> dict[str, object]:
    """What stands in the top level's modules, the entries of their dicts as well."""
    found = {}
    for module in ("preprocessing", "dataset", "metric", "model", "register", "trainer"):
        for name, value in vars(sys.modules[module]).items():
            if not name.startswith("__"):
                found[f"{module}.{name}"] = dict(value) if isinstance(value, dict) else value
    return found


UNCHANGED = project_globals()


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
        key = (path.stem, function.__name__, version(function), repr(job))
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


def script_parser(
    description: str,
    figure: str | None = None,
    table: str | None = None,
    scheduler: bool = True,
) -> argparse.ArgumentParser:
    """A script's parser, with the flags that several have.

    Args:
        description: the script's docstring
        figure: name of the figure that it draws, if it does
        table: name of the CSV file that it writes, if it does
        scheduler: whether it has jobs that a Dask cluster can do
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if figure:
        path = f"figure to write (default: data/figures/{figure}, which git ignores)"
        add("--figure", type=Path, default=OUTPUT / figure, metavar="PNG", help=path)
    if table:
        path = f"table to write, row by row (default: data/figures/{table}, which git ignores)"
        add("--table", type=Path, default=OUTPUT / table, metavar="CSV", help=path)
        kept = "keep the rows that the table has already, whatever code made them; compute others"
        add("--resume", action="store_true", help=kept)
    if scheduler:
        address = "compute on the workers of this Dask cluster instead of this machine's cores"
        add("--scheduler", metavar="tcp://HOST:8786", help=address)
    return parser


def training_flags(options: list[str], *ours: str) -> argparse.Namespace:
    """What exp-mnist.py makes of the flags that a script passes on to it.

    Those that it can't take end the script here, before anything is computed; UserError if there
    are flags that the script sets itself, `ours`.
    """
    set_by_us = {f"--{name}" for name in ours} & {word.split("=")[0] for word in options}
    if set_by_us:
        raise UserError(f"{', '.join(sorted(set_by_us))}: that is what each job sets itself")
    return training_parser().parse_args(options)


def check_writable(*paths: Path) -> None:
    """UserError if a file can't be written: to be found before the hours of computing it."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file is to be written")
        with written_whole(path) as partial:
            tempfile.TemporaryFile(dir=partial.parent).close()


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


@functools.cache
def version(function: Callable) -> str:
    """Of the code that a function's results depend on, as this process came to know it."""
    files = dict.fromkeys(map(inspect.getfile, (function, experiment)))
    sources = [logic(Path(path).read_text("utf-8")) for path in files]
    return hashlib.sha256(b"\0".join([*sources, CODE, torch.__version__.encode()])).hexdigest()


def perform(key: tuple[str, str, str, str], job: tuple) -> tuple:
    """Do a job in a worker; the function travels as its name, as a worker has no __main__ of ours.

    Raises UserError if this process has read other code than the one that asks, or if a script has
    changed the project's modules in it: no job may depend on what ran before it.
    """
    module, name, code, _ = key
    with LOCK, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        function = getattr(importlib.import_module(module), name)
        if version(function) != code:
            raise UserError("a worker runs another version of the code: start the workers again")
        now = project_globals()
        changed = [name for name, value in UNCHANGED.items() if now.get(name) != value]
        if changed:
            raise UserError(
                f"{', '.join(changed)}: changed in a worker by {module} or a script before it; "
                "start the workers again"
            )
        torch.set_num_threads(1)
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


class Trained(NamedTuple):
    """A repetition of an experiment, after its training."""

    repetition: int
    data: Dataset
    network: Network
    loss: Loss
    training: Samples  # what it was trained on
    validation: Samples | None  # what was held out
    seconds: float  # that the training took of a core


def experiment(
    arguments: list[str], drawing: dict | None = None, only: int | None = None
) -> Iterator[Trained]:
    """Train as exp-mnist.py does, on the CPU, on data that the seed draws.

    Args:
        arguments: as those of exp-mnist.py
        drawing: more arguments of `preprocessing.draw_environments`
        only: the one repetition that is wanted
    """
    args = training_parser().parse_args(arguments)
    args.evaluation_steps = args.iteration + 1  # no figures for a log that nobody reads
    args.repetitions = only or args.repetitions
    data = fresh_data(args.seed, drawing)
    for repetition, network, loss, training, validation in repetitions(args, data):
        if only in (None, repetition):
            start = time.process_time()  # of this process alone, however busy the machine is
            train(network, loss, training, validation, **training_settings(args))
            seconds = time.process_time() - start
            yield Trained(repetition, data, network, loss, training, validation, seconds)


def fresh_data(seed: int, drawing: dict | None = None) -> Dataset:
    """What a seed draws, on the CPU; its files are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        draw_environments(Path(folder), seed=seed, **drawing or {})
        return load_dataset(folder, seed)


class Table:
    """Rows of results in a CSV file, written as they come; a longer one is never replaced.

    Args:
        path: the file
        columns: name → type of its values; a row is a dict with these names
        resume: begin with the rows that the file has

    UserError if the file is there and isn't such a table, or if it can't be written.
    """

    def __init__(self, path: Path, columns: dict[str, type], resume: bool = True):
        self.path, self.columns = path, columns
        check_writable(path)
        there = self.read() if path.exists() else []
        self.longest = len(there)
        self.rows = there if resume else []

    def read(self) -> list[dict]:
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            return [{name: kind(row[name]) for name, kind in self.columns.items()} for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {self.path} as a table: {error!r}") from None

    def expect(self, count: int) -> None:
        """UserError if the table will be shorter than what it would replace."""
        if count < self.longest:
            raise UserError(
                f"{self.path} has {self.longest} rows, and this run would have {count}: add to it "
                "with --resume, or write another --table"
            )

    def add(self, rows: list[dict]) -> None:
        """Write the table with more rows, in the order of its columns."""
        self.rows += rows
        self.rows.sort(key=lambda row: tuple(row.values()))
        if len(self.rows) < self.longest:
            return
        with (
            written_whole(self.path) as partial,
            open(partial, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def commit() -> str:
    """The short name of the commit that is checked out, "" where there is no git.

    With a + where Python code differs from the commit's.
    """

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
        if head.returncode:
            return ""
        changed = git("status", "--porcelain", "--", "*.py", ":!tests").stdout
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed else "")


def save_figure(figure, path: Path) -> None:
    """Save a matplotlib figure as a PNG; the folder is made if it is missing."""
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    print(f"Figure: {path}")
