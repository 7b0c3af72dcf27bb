"""Tools for the scripts in this folder: sweeps of jobs, tables, flags, figures.

The jobs of a sweep run on all cores or on the workers of a Dask cluster. Each job has one thread.
The cluster's scheduler and workers start in the project's folder, with PYTHONPATH=.:benchmarks.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import Dataset, Samples, load_data  # noqa: E402
from model import Network  # noqa: E402
from preprocessing import UserError, generate_environments, replacing  # noqa: E402
from trainer import (  # noqa: E402
    arguments_of,
    build,
    seed_repetition,
    train,
    training_parser,
    warn_of_unused,
)

OUTPUT = ROOT / "data" / "figures"  # ignored by git, so no run replaces a file in figures/
LOCK = threading.Lock()
SET_BY_SCRIPTS = ("trainer", "seed", "dataset_path", "save_model")


def run_jobs(
    function: Callable, jobs: dict[object, tuple], scheduler: str | None = None
) -> Iterator[tuple[object, object]]:
    """Run `function` with each job's arguments. Yield a job's key and its result when it finishes.

    Args:
        function: a function at the top level of a script; workers import it and drop its output
        jobs: key → arguments
        scheduler: address of a Dask cluster; by default, jobs run on this machine's cores

    Raises:
        UserError: the cluster cannot be reached
    """
    script, name = Path(inspect.getfile(function)).stem, function.__name__
    calls = [delayed(perform)(script, name, *job) for job in jobs.items()]
    with workers(scheduler):
        parallel = Parallel(
            n_jobs=-1, batch_size=1, pre_dispatch="all", return_as="generator_unordered"
        )
        yield from tqdm(parallel(calls), total=len(calls), disable=None, leave=False)


@contextlib.contextmanager
def workers(scheduler: str | None) -> Iterator[None]:
    """Choose where joblib runs jobs: on this machine's cores or on a Dask cluster."""
    if scheduler is None:
        # Otherwise, an error in a job is followed by warnings about leaked semaphores.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        with parallel_config("loky"):
            yield
        return
    try:
        from distributed import Client

        client = Client(scheduler, timeout=10)
        client.wait_for_workers(1, timeout=10)
    except Exception as error:  # Dask raises many types
        reason = str(error).split("\n")[0]
        raise UserError(
            f"The Dask cluster {scheduler} cannot be used ({reason}). "
            "Start its scheduler and workers, or leave out --scheduler."
        ) from None
    with client, parallel_config("dask", client=client):
        yield


def perform(script: str, name: str, key: object, arguments: tuple) -> tuple[object, object]:
    """Run one job in a worker, with one thread. A worker runs one job at a time.

    The lock is needed because torch's random numbers belong to the process, and Dask's workers can
    have several threads.
    """
    with (
        LOCK,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        torch.set_num_threads(1)
        function = getattr(importlib.import_module(script), name)
        return key, function(*arguments)


class Table:
    """Rows of results in a CSV file, which is written whenever a job finishes.

    Args:
        path: the file
        columns: name → type; the first ones identify a job, and a column `commit` comes last
        resume: keep the rows of an existing file

    Raises:
        UserError: the file exists and `resume` is false, or it has other columns
    """

    def __init__(self, path: Path, columns: dict[str, type], resume: bool = True):
        self.path = path
        self.columns = columns | {"commit": str}
        self.rows = []  # dicts
        if path.exists():
            if not resume:
                raise UserError(f"{path} exists. Continue it with --resume, or delete it.")
            self.read()

    def read(self) -> None:
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    row = {name: kind(row[name]) for name, kind in self.columns.items()}
                    self.rows.append(row)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path} is not a table with the columns {', '.join(self.columns)}. "
                "Name another table."
            ) from None

    def fill(
        self, function: Callable, jobs: dict[tuple, tuple], scheduler: str | None = None
    ) -> None:
        """Run the jobs that have no rows yet, and write the table after each of them.

        Args:
            function: returns a list of rows, without the job's columns and `commit`
            jobs: values of the job's columns → arguments of `function`
            scheduler: address of a Dask cluster; by default, this machine's cores
        """
        length = len(next(iter(jobs)))
        finished = {tuple(row.values())[:length] for row in self.rows}
        missing = {key: arguments for key, arguments in jobs.items() if key not in finished}
        current_commit = commit()
        for key, rows in run_jobs(function, missing, scheduler):
            for values in rows:
                row = dict(zip(self.columns, (*key, *values, current_commit), strict=True))
                self.rows.append(row)
            self.write()

    def write(self) -> None:
        self.rows.sort(key=lambda row: tuple(row.values()))
        with (
            replacing(self.path) as partial,
            open(partial, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def select(rows: list[dict], **values: object) -> list[dict]:
    """Select the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def commit() -> str:
    """Return the short name of the current commit, or "" without git.

    A + follows if Python code differs from the commit.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", ":!tests")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.lru_cache(maxsize=1)  # consecutive jobs often use the same data
def fresh_data(seed: int, **generation: object) -> Dataset:
    """Generate data in a temporary folder and load them.

    Args:
        seed: seed of the data
        generation: other arguments of `preprocessing.generate_environments`
    """
    with tempfile.TemporaryDirectory() as folder:
        generate_environments(folder, seed=seed, **generation)
        return load_data(folder, seed)


def script_parser(
    description: str,
    figure: str | None = None,
    table: str | None = None,
    scheduler: bool = True,
) -> argparse.ArgumentParser:
    """Return a script's parser, with the flags that several scripts share.

    Args:
        description: the script's docstring
        figure: name of the figure, None if the script draws none
        table: name of the CSV file, None if the script writes none
        scheduler: whether the script runs jobs
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if figure:
        add(
            "--figure",
            type=Path,
            default=OUTPUT / figure,
            metavar="PNG",
            help=f"figure to write (default: data/figures/{figure})",
        )
    if table:
        add(
            "--table",
            type=Path,
            default=OUTPUT / table,
            metavar="CSV",
            help=f"table to write, job by job (default: data/figures/{table})",
        )
        add("--resume", action="store_true", help="keep the table's rows, compute missing ones")
    if scheduler:
        add(
            "--scheduler",
            metavar="tcp://HOST:8786",
            help="Dask cluster that runs the jobs (default: this machine's cores)",
        )
    return parser


def training_arguments(row: str) -> argparse.Namespace:
    """Parse a trainer and other flags of exp-mnist.py, such as "IRM --iteration 1200".

    A wrong flag ends the script. A flag that has no effect gives a warning.

    Raises:
        UserError: the row has a flag that the scripts set themselves
    """
    words = row.split()
    for name in SET_BY_SCRIPTS:
        if f"--{name}" in [word.split("=")[0] for word in words]:
            raise UserError(f"The script sets --{name} itself. Leave it out.")
    args = training_parser().parse_args(["--trainer", *words])
    warn_of_unused(args)
    return args


def watch_training(
    args: argparse.Namespace,
    data: Dataset,
    repetition: int,
    watch: Callable[[Network, Samples, int], None],
) -> None:
    """Train a repetition as `trainer.train_repetition` does, and watch it.

    Args:
        watch: function called before the training and every `evaluation_steps`, with the network,
            the validation samples and the number of finished iterations
    """
    seed_repetition(args, repetition)
    training, validation = data.hold_out(args.validation)
    network, loss = build(args)
    report = functools.partial(watch, network, validation)
    report(0)
    train(network, loss, training, report=report, **arguments_of(train, args))


def print_table(titles: list[str], rows: list[list]) -> None:
    """Print a table in Markdown."""
    for cells in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(map(str, cells))} |")


def save_figure(figure, path: Path) -> None:
    """Save a matplotlib figure as a PNG and print its path."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    print(f"Figure: {path}")
