"""The command line. A user's mistake is answered by one line on standard error and exit code 2, not by a traceback."""

# No `from __future__ import annotations`: typer reads the annotations, and it is imported only when it is used.

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from compressm.errors import CompressmError, ConfigError, MissingExtraError

if TYPE_CHECKING:
    import typer

_PICTURES = (".png", ".svg", ".pdf")


def leave(code: int) -> NoReturn:
    """Exit; after work in several processes without the interpreter's own end.

    gloo's threads outlive a process group that DistributedDataParallel has used (torch 2.13, with or without
    ``destroy_process_group``), and now and then abort a process that has done all its work.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; by default this process's own.

    Returns:
        the exit code: 0, or 2 after a user's mistake, or 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except CompressmError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 1
    except MemoryError:
        return _fail("out of memory; free some, or ask for less")
    except OSError as error:  # a full disk, a folder without permission: what the user can mend, said by the system
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _dispatch(given: list[str]) -> int:
    try:
        import typer
    except ModuleNotFoundError as error:
        raise MissingExtraError('the command line needs typer: pip install "compressm[train]"') from error
    # From some version on typer has its own copy of click: the base of all usage errors is reached through its names.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        code: Any = _app(shlex.join(["compressm", *given]))(args=given, prog_name="compressm", standalone_mode=False)
    except usage_error as error:
        message: str = getattr(error, "format_message")()  # noqa: B009  # not in typer's public types
        return _fail(f"{message.rstrip('.')}; see compressm --help")
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    # What a file or an argument holds shall not steer the terminal.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    return 2


def _app(command_line: str) -> "typer.Typer":
    import typer

    def file_option(*names: str, help: str, endings: Sequence[str] = ()) -> Any:
        """An option for a file to write, which is checked before the work whose result goes there."""

        def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
            if path is None or str(path) == "-":
                return path
            given = f"{parameter.opts[0]} {path}"
            if endings and path.suffix not in endings:
                raise ConfigError(f"{given}: the name must end with {' or '.join(endings)}")
            if not path.absolute().parent.is_dir():
                raise ConfigError(f"{given}: its folder does not exist; create it or choose another place")
            return path

        return typer.Option(*names, help=help, callback=check)

    json_file = file_option("--json", help="Write the result to this file; - prints it.")
    markdown_file = file_option("--markdown", help="Write the table to this file.")
    app = typer.Typer(
        help="In-training compression of state space models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    def version(wanted: bool) -> None:
        if wanted:
            from compressm import __version__

            print(f"compressm {__version__}")
            raise typer.Exit

    @app.callback()
    def common(  # pyright: ignore[reportUnusedFunction]
        version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        pass

    @app.command()
    def train(  # pyright: ignore[reportUnusedFunction]
        config: Annotated[
            Path,
            typer.Argument(
                metavar="CONFIG",
                help="YAML file, or a built-in one: digits, demo, smnist, psmnist, smnist-mamba, scifar, listops or "
                "imdb.",
            ),
        ],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[key=value]...", help="For example optimizer.lr=1e-3.")
        ] = None,
        resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the run's folder.")] = False,
        origin: Annotated[
            Path | None,
            typer.Option("--from", help="Folder of the same run without compression; its steps are not made again."),
        ] = None,
        output: Annotated[Path | None, typer.Option(help="The run's folder [runs/CONFIG-seedN].")] = None,
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Train a model, and compress it meanwhile."""
        from compressm.lab.config import load_config
        from compressm.lab.runs.loop import train as run

        settings = load_config(config, overrides or [])
        if output is None and settings.run.output is None:
            output = Path("runs") / f"{config.stem}-seed{settings.run.seed}"
        result = run(settings, output=output, resume=resume, origin=origin, command=command_line)
        _write_result(json, result.to_dict())

    @app.command()
    def demo(  # pyright: ignore[reportUnusedFunction]
        seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 4,
        steps: Annotated[int | None, typer.Option(min=40, help="Training steps of each run [1500].")] = None,
        picture: Annotated[Path, file_option(help="Where to draw the picture.", endings=_PICTURES)] = Path("demo.png"),
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Train big, shrink, compare: handwritten digits, in about two minutes on two cores."""
        from compressm.lab.demo import run_demo

        _write_result(json, run_demo(seeds=seeds, steps=steps, picture=picture, command=command_line))

    @app.command()
    def reproduce(  # pyright: ignore[reportUnusedFunction]
        name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment; without one they are listed.")] = "",
        seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0 [the experiment's].")] = None,
        arms: Annotated[str | None, typer.Option(help="Only these ways of training, by commas.")] = None,
        steps: Annotated[int | None, typer.Option(min=20, help="Training steps of each run.")] = None,
        data: Annotated[Path | None, typer.Option(help="Directory with the data [$COMPRESSM_DATA].")] = None,
        workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time [one per CPU].")] = None,
        results: Annotated[Path, typer.Option(help="Folder of the results, one JSON file per run.")] = Path("results"),
        runs: Annotated[Path, typer.Option(help="Folder of unfinished runs.")] = Path("runs"),
        cluster: Annotated[
            Literal["slurm", "local"] | None, typer.Option(help="Make every run a job of this scheduler (submitit).")
        ] = None,
        cluster_options: Annotated[
            str | None, typer.Option(help="Of the jobs: timeout_min=600,slurm_partition=gpu and so on.")
        ] = None,
        picture: Annotated[
            Path | None, file_option(help="Draw the comparison into this file.", endings=_PICTURES)
        ] = None,
        markdown: Annotated[Path | None, markdown_file] = None,
        show: Annotated[bool, typer.Option("--show", help="Train nothing: the table of what is stored.")] = False,
    ) -> None:
        """Reproduce a comparison of the paper, or of ours, run by run; after a kill the same command goes on."""
        from compressm.lab.reproduce import command

        chosen = None if arms is None else [arm.strip() for arm in arms.split(",")]
        if not name and not show:
            command.list_experiments()
            return
        if not show:
            executor = None
            if cluster is not None:
                from compressm.lab.reproduce.cluster import on_cluster, parse_options

                executor = on_cluster(cluster, runs / "jobs", parse_options(cluster_options))
            command.run_experiment(
                name, seeds, chosen, results, runs, steps=steps, data=data and str(data), workers=workers,
                command=command_line, executor=executor,
            )  # fmt: skip
        command.show_experiments([name] if name else [], results, markdown, picture)

    @app.command("import")
    def import_(  # pyright: ignore[reportUnusedFunction]
        config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the CompreSSM paper's code.")],
        output: Annotated[Path, file_option(help="The YAML file for compressm train.")],
    ) -> None:
        """Bring a configuration over from the paper's published code."""
        from compressm.lab.runs.migrate import import_config, write_config

        write_config(import_config(config), output)
        print(f"{output}: run it with compressm train {output}")

    @app.command()
    def report(  # pyright: ignore[reportUnusedFunction]
        runs: Annotated[
            list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or of saved models, or result files.")
        ],
        output: Annotated[Path, file_option(help="The HTML file.")] = Path("report.html"),
    ) -> None:
        """One page about one run, or several beside each other; it opens in a browser, offline."""
        from compressm.lab.report import load_runs, write_report

        write_report(load_runs(runs), output, command_line)
        print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")

    @app.command()
    def analyze(  # pyright: ignore[reportUnusedFunction]
        checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder, or our own.")],
        data: Annotated[
            Path | None, typer.Option(help="As for compress; needed for layers whose states depend on the data.")
        ] = None,
        sequences: Annotated[int, typer.Option(help="Sequences to look at.")] = 32,
        length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
        plot: Annotated[
            Path | None, file_option(help="Draw the spectra into this file.", endings=(".html", *_PICTURES))
        ] = None,
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Show how many states each layer of a trained model really uses, and what a cut would save."""
        from rich.console import Console

        from compressm.lab.one_shot import analyze_checkpoint
        from compressm.runtime.files import replacing

        analysis = analyze_checkpoint(checkpoint, data, sequences=sequences, length=length)
        if str(json) != "-":
            Console().print(analysis.table())
            for line in analysis.refusals:
                print(line)
        if plot is not None:
            try:
                with replacing(plot) as new:
                    if plot.suffix == ".html":
                        analysis.spectrum.plot("plotly").write_html(new)
                    else:
                        analysis.spectrum.plot("matplotlib").savefig(new, dpi=150, format=plot.suffix[1:])
            except OSError as error:
                raise ConfigError(
                    f"--plot {plot}: cannot be written ({error.strerror}); choose another place"
                ) from error
        _write_result(json, {"command": command_line, **analysis.to_dict()})

    @app.command()
    def compress(  # pyright: ignore[reportUnusedFunction]
        checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder, or our own.")],
        data: Annotated[
            Path, typer.Option(help="Text for a language model; .npz with x, y for a classifier, or with x for tokens.")
        ],
        output: Annotated[Path, typer.Option(help="Folder for the smaller checkpoint.")],
        states: Annotated[int | None, typer.Option(help="State dimension to cut every layer to.")] = None,
        tolerance: Annotated[float | None, typer.Option(help="Share of the Hankel energy to discard.")] = None,
        fraction: Annotated[float | None, typer.Option(help="Share of the states to keep.")] = None,
        sequences: Annotated[int, typer.Option(help="Sequences to cut by, and as many to measure the loss on.")] = 32,
        length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Cut a trained checkpoint once, and show what was lost."""
        from compressm.lab.one_shot import compress_checkpoint

        loss = compress_checkpoint(
            checkpoint,
            output,
            data,
            states=states,
            tolerance=tolerance,
            fraction=fraction,
            sequences=sequences,
            length=length,
        )
        if str(json) != "-":
            print(loss)
        _write_result(json, {"command": command_line, "output": str(output), **loss.to_dict()})

    @app.command()
    def bench(  # pyright: ignore[reportUnusedFunction]
        suites: Annotated[
            list[str], typer.Argument(metavar="SUITE...", help="lru, selective, ssd, reduction, train; or all.")
        ],
        quick: Annotated[bool, typer.Option("--quick", help="Few repetitions.")] = False,
        only: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows whose name contains this.")] = None,
        sweep: Annotated[bool, typer.Option("--sweep", help="Time against n, length and batch too.")] = False,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        plot: Annotated[Path | None, file_option(help="Draw the sweeps into this file.", endings=_PICTURES)] = None,
        markdown: Annotated[Path | None, markdown_file] = None,
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Measure speed and memory beside other implementations, and beside what the machine could do."""
        from compressm.lab.bench.run import run_bench

        result = run_bench(
            suites,
            quick=quick,
            only=only,
            sweeps=sweep,
            device=device,
            picture=plot,
            table=markdown,
            command=command_line,
        )
        _write_result(json, result)

    @app.command()
    def export(  # pyright: ignore[reportUnusedFunction]
        checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder that compressm.save wrote.")],
        format: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or a torch.export program.")] = "onnx",
        step: Annotated[bool, typer.Option("--step", help="One time step, its state as inputs and outputs.")] = False,
        int8: Annotated[bool, typer.Option("--int8", help="Weights as 8-bit integers; ONNX only.")] = False,
        lengths: Annotated[bool, typer.Option("--lengths", help="A second input: lengths of padded rows.")] = False,
        int8_error: Annotated[
            float,
            typer.Option(help="Most that 8 bits may change the outputs: RMS, in their standard deviations."),
        ] = 0.02,
        data: Annotated[
            Path | None, typer.Option(help="Sequences to check with: .npz with x (N, length, ...) [random ones].")
        ] = None,
        output: Annotated[Path | None, file_option(help="The file [CHECKPOINT/model-step-int8.onnx].")] = None,
        json: Annotated[Path | None, json_file] = None,
    ) -> None:
        """Export a model for deployment, and check that it computes the same."""
        from compressm.lab.data.arrays import read_arrays
        from compressm.observing.expected import Expected
        from compressm.saving.checkpoint import load
        from compressm.saving.export import to_onnx, to_torch

        if int8 and format == "torch":
            raise ConfigError("--int8 is for --format onnx; leave it out, or export to ONNX")
        model = load(checkpoint)
        name = "model" + "-step" * step + "-int8" * int8 + (".onnx" if format == "onnx" else ".pt2")
        path = output or checkpoint / name
        example = None if data is None else read_arrays(data, Expected.of(model), labelled=False).x
        if format == "onnx":
            report = to_onnx(model, path, step=step, int8=int8, example=example, int8_error=int8_error, lengths=lengths)
        else:
            report = to_torch(model, path, step=step, example=example, lengths=lengths)
        if str(json) != "-":
            print(report)
        _write_result(json, {"command": command_line, **report.to_dict()})

    return app


def _write_result(path: Path | None, result: dict[str, Any]) -> None:
    """The machine-readable result, to a file, or to standard output for ``-``."""
    if path is None:
        return
    from compressm.runtime.files import finite, write_json

    if str(path) == "-":
        print(json.dumps(finite(result), indent=1))
    else:
        write_json(path, finite(result))


if __name__ == "__main__":
    leave(main())
