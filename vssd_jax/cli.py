"""Shared by the command-line scripts: flags, the config, and errors.

An error that the user can correct is one line on standard error and exit status 2.
"""

import itertools
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

from vssd_jax.errors import UserError, did_you_mean, missing_extra

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def define_config() -> flags.FlagHolder:
    """The `--config` flag, whose fields `--config.field=value` overrides."""
    try:
        from ml_collections import config_flags
    except ModuleNotFoundError as error:
        _fail(missing_extra(error) or str(error))
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, for example configs/digits.py.", lock_config=True
    )


def define_processes() -> None:
    """The flags that join several processes."""
    flags.DEFINE_bool(
        "distributed", False, "Join the processes of a SLURM, Kubernetes, Open MPI or TPU job."
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX detects nothing.")
    flags.DEFINE_integer("num_processes", None, "How many processes --coordinator joins.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")


def join_processes() -> None:
    """Does what the flags of `define_processes` ask for; before JAX computes anything."""
    given = flags.FLAGS
    if given.coordinator is not None:
        if given.num_processes is None or given.process_id is None:
            raise UserError("--coordinator needs --num_processes and --process_id")
    elif given.num_processes is not None or given.process_id is not None:
        raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT")
    elif not given.distributed:
        return
    from vssd_jax import distributed

    distributed.initialize(given.coordinator, given.num_processes, given.process_id)


def load_config() -> "ConfigDict":
    """The ConfigDict that `--config` names, with its overrides."""
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is missing; see --help")
    path = _config_path()
    if not path.is_file():
        raise UserError(f"there is no config file {path}")
    try:
        config.to_dict()  # ml_collections keeps what the file raised for the first access
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{path} cannot be loaded: {type(cause).__name__}: {cause}") from cause
    return config


def config_name() -> str:
    """The name of the given config file without folder, suffix and argument."""
    return _config_path().stem


def command_line() -> str:
    """This command, for a shell."""
    return _command(pathlib.Path(sys.argv[0]), sys.argv[1:])


def other_command(name: str, *arguments: str, config: bool = True) -> str:
    """The command `name` ("eval", "predict") with these arguments, for a shell.

    Args:
      config: whether it gets this command's config too.
    """
    program = pathlib.Path(sys.argv[0])
    program = program.with_name(f"{name}.py" if program.suffix == ".py" else f"vssd-{name}")
    given = _config_arguments(sys.argv[1:]) if config else []
    return _command(program, [*given, *arguments])


def _command(program: pathlib.Path, arguments: list[str]) -> str:
    words = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *arguments])


def _config_arguments(argv: list[str]) -> list[str]:
    """`--config` and its overrides, whose values may be arguments of their own."""
    found = []
    for before, argument in itertools.pairwise(["", *argv]):
        value = re.fullmatch(r"--?config(\.\S+)?", before) and not argument.startswith("--")
        if value or re.match(r"--?config(\.|=|$)", argument):
            found.append(argument)
    return found


def _config_path() -> pathlib.Path:
    from ml_collections import config_flags

    name = config_flags.get_config_filename(flags.FLAGS["config"])
    return pathlib.Path(name.split(":")[0])  # what follows a colon is get_config's argument


def run(main: Callable[[], None], module: str, *, command: str | None = None) -> None:
    """Parses the flags and calls `main`.

    Args:
      main: what the command does.
      module: that defines its flags, for --help.
      command: the word that must stand before or between the flags, if one must.
    """

    def parse(argv: list[str]) -> list[str]:
        # --some-flag is --some_flag; what follows a dot or an equals sign stays as it is.
        # ml_collections reads no None for a field of another type.
        none = [m[1] for a in argv if (m := re.fullmatch(r"--config\.(\w+)=None", a))]
        argv = [a for a in argv if not re.fullmatch(r"--config\.\w+=None", a)]
        argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
        if {"--help", "-h", "--helpshort"} & set(argv):
            _help(module)
        try:
            argv = [_with_config(before, a) for before, a in itertools.pairwise(["", *argv])]
            rest = flags.FLAGS(argv)
        except (flags.Error, UserError) as error:
            _fail(str(error))
        except (AttributeError, KeyError) as error:  # ml_collections: no such field
            near = re.search(r'Did you mean "(\w+)"', str(error))
            name = re.search(r"\w+", str(error.args[0]))
            hint = f"; did you mean {near[1]!r}?" if near else ""
            _fail(f"the config has no field {name[0]!r}{hint}" if name else str(error))
        except OSError as error:  # an override of a config that cannot be loaded
            _fail(f"the config cannot be loaded: {str(error).splitlines()[-1]}")
        except SyntaxError as error:
            _fail(f"the config is not a Python file: {error}")
        for field in none:
            _clear(field)
        if command is not None:
            if command not in rest[1:2]:
                given = f", not {rest[1]!r}" if len(rest) > 1 else ""
                _fail(f"the command is {command!r}{given}; see --help")
            del rest[1]
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; options are --name=value")
        return rest

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax also logs every error it raises, a page each
        try:
            main()
            return
        except UserError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if (line := missing_extra(error)) is None:
                raise
            message = line
        except KeyboardInterrupt:
            sys.stdout.flush()
            os._exit(130)
        except Exception as error:
            if "jax" not in sys.modules:
                raise
            from vssd_jax import distributed

            line = distributed.failure(error)
            if line is None:
                raise
            print(f"{pathlib.Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
            distributed.outlive_others()
            _exit_now(1)
        # The error's frames are gone by now, and with them the workers and their memory.
        _fail(message)

    app.run(guarded, flags_parser=parse)


def _help(module: str) -> NoReturn:
    """Prints what a command does and its flags."""
    print((sys.modules[module].__doc__ or "").strip())
    own = module if module != "__main__" else sys.argv[0]
    by_module = flags.FLAGS.flags_by_module_dict()
    for flag in (*by_module.get(own, ()), *by_module.get(__name__, ())):
        default = "" if flag.default is None else f" (default: {flag.default})"
        print(f"\n  --{flag.name.replace('_', '-')}: {flag.help}{default}")
    sys.exit(0)


def _with_config(before: str, argument: str) -> str:
    """An argument with the path in place of a config's name."""
    if before == "--config":
        return _find_config(argument)
    if argument.startswith("--config="):
        return f"--config={_find_config(argument.removeprefix('--config='))}"
    return argument


def _find_config(name: str) -> str:
    """The path of a config that is given by its name alone, such as `digits` or `tiny:mesa`."""
    stem, colon, argument = name.partition(":")
    if not re.fullmatch(r"\w+", stem) or pathlib.Path(stem).exists():
        return name
    package = pathlib.Path(__file__).parent
    # Part of an installed package; beside it in a checkout.
    for folder in (package / "configs", package.parent / "configs"):
        if (path := folder / f"{stem}.py").is_file():
            return f"{path}{colon}{argument}"
    names = sorted(p.stem for f in ("configs", "../configs") for p in (package / f).glob("*.py"))
    raise UserError(f"there is no config {stem!r}{did_you_mean(stem, names)}")


def _clear(name: str) -> None:
    """Sets a field of the config to None."""
    from vssd_jax.config import OPTIONAL

    config = flags.FLAGS.config
    if config is None or name not in config:
        _fail(f"the config has no field {name!r}")
    if name not in OPTIONAL:
        _fail(f"config.{name} cannot be None")
    config[name] = None


def _fail(message: str) -> NoReturn:
    line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"{pathlib.Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        _exit_now(2)
    sys.exit(2)


def _exit_now(status: int) -> NoReturn:
    """Ends a process of several, without the minutes of waiting for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
