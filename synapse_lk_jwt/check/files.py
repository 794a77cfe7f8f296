# SPDX-License-Identifier: Apache-2.0
"""Reads Synapse's configuration files as Synapse does, and names what keeps it from starting."""

import contextlib
import getpass
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attr
import yaml
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt.check.report import Finding, wrong
from synapse_lk_jwt.check.setup import MODULE, Credentials, Setup, from_synapse
from synapse_lk_jwt.compat.config import (
    MAIN,
    HomeServerConfig,
    find_config_files,
    load_config,
    read_config_files,
)
from synapse_lk_jwt.config import OPTIONS, LiveKitJwtConfig, parse_config

_BLOCK = (
    "modules:",
    f"  - module: {MODULE}",
    "    config:",
    "      livekit_url: wss://sfu.example.com",
    "      livekit_key: APIxxxx",
    "      livekit_secret_path: /etc/matrix-synapse/livekit_secret",
)

# Options whose values are never printed. A shorter value is no secret.
_SECRET_OPTION = re.compile(r"secret|pass|token|key|salt|credential|macaroon", re.IGNORECASE)
_MIN_SECRET_LENGTH = 4


class CannotRun(Exception):
    """The command cannot check anything. The text names the cause."""


class DoesNotStart(Exception):
    """Synapse does not start with this configuration, or starts without the module.

    Attributes:
        finding: what to write.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Files:
    """The configuration files.

    Attributes:
        names: their names, as on the command line.
        content: the files as one mapping; later ones win.
        file_of: the file of each top-level option.
        duplicates: top-level options that are set more than once, by file.
    """

    names: tuple[str, ...]
    content: Mapping[str, Any]
    file_of: Mapping[str, str]
    duplicates: Mapping[str, Sequence[str]]

    def file(self, option: str) -> str:
        return self.file_of.get(option, self.names[0])


def read(paths: Sequence[str]) -> Setup:
    """Reads Synapse's configuration as Synapse does.

    Args:
        paths: files, and directories of `.yaml` files; later ones win.

    Raises:
        CannotRun: if Synapse does not start with it, for reasons outside of this module.
        DoesNotStart: if the command can show what to write instead.
    """
    try:
        # Synapse prints which files it ignores, and that is no part of the report.
        with contextlib.redirect_stdout(sys.stderr):
            return _read(paths)
    except (CannotRun, DoesNotStart):
        raise
    except ConfigError as e:
        raise CannotRun(f"Synapse does not start: {e.msg}") from None
    except OSError as e:
        cause = f"{e.filename!r} cannot be read ({e.strerror})"
        raise CannotRun(f"{cause}{_user_hint(str(e))}") from None
    except Exception as e:
        # Synapse reads some values without checking their type. The error may quote a secret.
        raise CannotRun(
            f"Synapse does not start with this configuration ({type(e).__name__}). Start Synapse to"
            " see the whole message"
        ) from None


def _read(paths: Sequence[str]) -> Setup:
    files = _read_files(paths)
    _check_empty(files)
    block = _find_block(files)
    module = _read_module(block, files.file("modules"))
    setup = from_synapse(_load_config(files), module)
    return attr.evolve(
        setup,
        # The names from the command line, because Synapse makes their paths absolute.
        files=files.names,
        file_of=files.file_of,
        background=files.content.get("run_background_tasks_on") or MAIN,
        times_loaded=len(_blocks(files.content)),
        duplicate_options=files.duplicates,
        credentials=_credentials(block.get("config") or {}),
    )


def _load_config(files: _Files) -> HomeServerConfig:
    """Synapse's own configuration object.

    Raises:
        CannotRun: with Synapse's message, if it rejects an option.
    """
    try:
        return load_config(files.names)
    except ConfigError as e:
        place = f" (option {'.'.join(map(str, e.path))})" if e.path else ""
        text = _without_secrets(e.msg, files.content)
        raise CannotRun(f"Synapse does not start{place}: {text}{_user_hint(e.msg)}") from None


def _read_files(paths: Sequence[str]) -> _Files:
    names = find_config_files(list(paths))
    if not names:
        raise CannotRun(f"no .yaml file in {' or '.join(map(repr, paths))}")
    file_of: dict[str, str] = {}
    duplicates: dict[str, Sequence[str]] = {}
    for name in names:
        options = list(_options(name))
        repeated = {option for option in options if options.count(option) > 1}
        if "modules" in options and "modules" in file_of:
            repeated.add("modules")
        if repeated:
            duplicates[name] = sorted(repeated)
        file_of.update(dict.fromkeys(options, name))
    return _Files(tuple(names), read_config_files(names), file_of, duplicates)


def _options(name: str) -> Iterator[str]:
    """The top-level options of a file, duplicates included."""
    try:
        with open(name) as file:
            node = yaml.compose(file, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        # The error can quote a line, which may contain a secret.
        mark = getattr(e, "problem_mark", None)
        where = f": see line {mark.line + 1}" if mark else ""
        is_star = isinstance(e, yaml.composer.ComposerError) or "alias" in str(
            getattr(e, "context", "")
        )
        hint = ". A value that begins with * needs quotes: '*'" if is_star else ""
        raise CannotRun(f"{name!r} is not YAML{where}{hint}") from None
    if isinstance(node, yaml.MappingNode):
        yield from (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))


def _check_empty(files: _Files) -> None:
    """Finds an empty option, which remains when an admin deletes the only entry of a list.

    Raises:
        DoesNotStart
    """
    rtc = files.content.get("matrix_rtc")
    if isinstance(rtc, dict) and "transports" in rtc and rtc["transports"] is None:
        raise DoesNotStart(
            wrong(
                "rtc/transports",
                "Synapse does not start: transports below matrix_rtc is empty. Remove the option"
                " matrix_rtc, or write the empty list",
                files.file("matrix_rtc"),
                "matrix_rtc:",
                "  transports: []",
            )
        )
    option = "extra_well_known_client_content"
    if option in files.content and files.content[option] is None:
        raise DoesNotStart(
            wrong(
                ".well-known",
                f"Synapse does not start: {option} is empty. Remove the option, or write the empty"
                " mapping",
                files.file(option),
                f"{option}: {{}}",
            )
        )


def _blocks(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [block for block in _modules(content) if _named(block).startswith("synapse_lk_jwt.")]


def _modules(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    modules = content.get("modules")
    return [b for b in (modules if isinstance(modules, list) else []) if isinstance(b, dict)]


def _named(block: Mapping[str, Any]) -> str:
    return str(block.get("module", ""))


def _find_block(files: _Files) -> Mapping[str, Any]:
    """The module's block in the list of modules."""
    file = files.file("modules")
    for block in _modules(files.content):
        name = _named(block)
        if name != MODULE and name.lower().replace("-", "_").startswith("synapse_lk_jwt"):
            text = f"Synapse does not start: no module has the name {name!r}. Write {MODULE}"
            raise DoesNotStart(wrong("module", text, file, f"  - module: {MODULE}"))
    blocks = _blocks(files.content)
    if blocks:
        return blocks[0]
    if files.content.get("modules"):
        text = "is not in the configuration, so Synapse does not load it. Add it to the list"
        raise DoesNotStart(wrong("module", text, f"{file}, below 'modules:'", *_BLOCK[1:]))
    text = "is not in the configuration, so Synapse does not load it"
    raise DoesNotStart(wrong("module", text, file, *_BLOCK))


def _read_module(block: Mapping[str, Any], file: str) -> LiveKitJwtConfig:
    """The module's configuration.

    Raises:
        DoesNotStart: if the module rejects it.
    """
    config = block.get("config") or {}
    misplaced = [option for option in OPTIONS if option in block]
    if misplaced:
        text = (
            f"Synapse does not start: {', '.join(misplaced)} must be below 'config:', with two more"
            " spaces in front"
        )
        lines = (f"  - module: {MODULE}", "    config:", f"      {misplaced[0]}: …")
        raise DoesNotStart(wrong("module", text, file, *lines))
    try:
        return parse_config(config)
    except ConfigError as e:
        hint = (
            ""
            if config
            else (
                ". This command reads LIVEKIT_* variables from this shell. Export the ones that"
                " Synapse has"
            )
        )
        text = f"Synapse does not start with this configuration: {e.msg}{hint}{_user_hint(e.msg)}"
        raise DoesNotStart(wrong("module", text, file)) from None


def _credentials(config: Mapping[str, Any]) -> Credentials:
    """Where the module reads key and secret from, according to the rules of `config.py`."""
    variables = ("LIVEKIT_SECRET", "LIVEKIT_SECRET_FROM_FILE")
    options = ("livekit_key_file", "livekit_secret", "livekit_secret_path")
    option = next((name for name in options if name in config), None)
    if option is None:
        names = ("LIVEKIT_KEY_FILE", *variables)
        option = next((name for name in names if os.environ.get(name)), "LIVEKIT_SECRET")
    values = {**os.environ, **config}
    paths = [
        str(values[name])
        for name in (option, "livekit_key_path" if "livekit_key_path" in config else "")
        if name.lower().endswith(("_path", "_file")) and values.get(name)
    ]
    return Credentials(option, tuple(path.strip() for path in paths))


def _without_secrets(text: str, content: Any) -> str:
    """A message of Synapse, without the secrets of the configuration.

    A message that quotes a secret is replaced as a whole.
    """
    if any(secret in text for secret in _secrets(content)):
        return "the message quotes a secret. Start Synapse to see it"
    return text


def _secrets(content: Any, is_secret: bool = False) -> Iterator[str]:
    """The values of options that are named after secrets, at any depth."""
    if isinstance(content, dict):
        for option, value in content.items():
            yield from _secrets(value, is_secret or bool(_SECRET_OPTION.search(str(option))))
    elif isinstance(content, list):
        for value in content:
            yield from _secrets(value, is_secret)
    elif is_secret and isinstance(content, (str, int)) and not isinstance(content, bool):
        text = str(content)
        if len(text) >= _MIN_SECRET_LENGTH and not text.startswith("/"):
            yield text


def _user_hint(cause: str) -> str:
    """The addition to a message about a file that this user may not read."""
    if "Permission denied" not in cause:
        return ""
    return f". This command runs as {_user()}. Run it as Synapse's user"


def _user() -> str:
    try:
        return repr(getpass.getuser())
    except (KeyError, OSError):
        # The user of a container may have no name.
        return f"user {os.geteuid()}"
