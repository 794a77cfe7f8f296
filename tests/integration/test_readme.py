# SPDX-License-Identifier: Apache-2.0
"""A script follows README.md as a new admin does, from the quick install to a call.

It runs the commands and pastes the lines of the README. The tables of replacements below are the
only changes to them.
"""

import asyncio
import getpass
import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from testbed.call import Participant
from testbed.fresh_install import MATRIX, ROOT, SERVER_NAME, SFU, FreshInstall
from testbed.matrix import User

SERVING = "Serving LiveKit access tokens at https://"
# `editor` is an admin who replaces the file with the one that lies ready.
EDITOR = '#!/bin/sh\ncat "$TYPED/${1##*/}" > "$1"\n'


def section(page: str, heading: str) -> str:
    """The text below a heading of a page, up to the next heading."""
    text = (ROOT / page).read_text()
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def blocks(page: str, heading: str, language: str) -> list[str]:
    """The code blocks of one language below a heading of a page."""
    pattern = rf"^( *)```{language}\n(.*?)^ *```"
    found = re.findall(pattern, section(page, heading), re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def livekit_locations() -> str:
    """The nginx lines that step 5 links to."""
    assert "docs/reverse-proxy.md#in-front-of-livekit" in section("README.md", "### Steps")
    (lines,) = blocks("docs/reverse-proxy.md", "## In front of LiveKit", "nginx")
    return lines.replace("127.0.0.1:7880", "LIVEKIT")


def replaced(text: str, replacements: dict[str, str]) -> str:
    for written, real in replacements.items():
        text = text.replace(written, real)
    return text


@dataclass(frozen=True)
class Followed:
    """What an admin has after the steps, and two users of the homeserver.

    Attributes:
        machine: the machine of the admin.
        packages_before: what `pip list` printed before the installation.
        check: the command of the last step.
        alice: a user.
        bob: another user.
        room_id: a room that both users are joined to.
    """

    machine: FreshInstall
    packages_before: set[str]
    check: str
    alice: User
    bob: User
    room_id: str

    def verify(self, user: User) -> list[tuple[str, str, str]]:
        """Run the commands of "Verify it" as a user.

        Returns:
            Each command with the answer that the README shows, and the real answer.
        """
        values = {
            "syt_…": user.access_token,
            "@alice:example.com": user.user_id,
            "!room:example.com": self.room_id,
            "ABCDEFG": user.device_id,
            "example.com": SERVER_NAME,
        }
        token = ""
        done = []
        for block in blocks("README.md", "## Verify it", "console"):
            for entry in block.removeprefix("$ ").split("\n$ "):
                command, _, shown = entry.strip().partition("\n")
                if command.startswith("TOKEN="):
                    token = replaced(command, values) + "\n"
                    continue
                answer = self.machine.shell(token + replaced(command, values))
                done.append((command, replaced(shown, values), answer))
                if "access_token" in answer:
                    values["MaJu…"] = json.loads(answer)["access_token"]
        return done

    def livekit_token(self, user: User) -> str:
        """The LiveKit token in the last answer of "Verify it"."""
        _, _, answer = self.verify(user)[-1]
        token = json.loads(answer)["jwt"]
        assert isinstance(token, str)
        return token


def on_this_machine(machine: FreshInstall) -> dict[str, str]:
    """What the README's lines have, and what takes its place in the fresh directory."""
    connections = " ".join(f"--connect-to {connection}" for connection in machine.connections())
    return {
        "/opt/venvs/matrix-synapse": str(machine.venv),
        "/etc/matrix-synapse": str(machine.etc),
        # One user runs all.
        "sudo -u matrix-synapse ": "",
        "-o matrix-synapse ": f"-o {getpass.getuser()} ",
        "127.0.0.1:8008": f"127.0.0.1:{machine.port}",
        "127.0.0.1:7880": f"127.0.0.1:{machine.livekit.port}",
        "APIxxxx": machine.livekit.key,
        # The check finds the names and the key of the documentation, and calls them placeholders.
        "example.com": SERVER_NAME,
        # The public names lead to nginx on this machine.
        " check -c ": f" check {connections} -c ",
    }


def install(machine: FreshInstall, replacements: dict[str, str], homeserver: Any) -> None:
    """Run the quick install. `homeserver` is what the admin makes of homeserver.yaml."""
    typed, bin_directory = machine.directory / "typed", machine.directory / "bin"
    typed.mkdir()
    (typed / "livekit_secret").write_text(machine.livekit.secret + "\n")
    (typed / "homeserver.yaml").write_text(yaml.safe_dump(homeserver))
    bin_directory.mkdir()
    (bin_directory / "editor").write_text(EDITOR)
    (bin_directory / "editor").chmod(0o755)
    env = machine.pip_environment({"TYPED": str(typed)})
    env["PATH"] = f"{bin_directory}:{env['PATH']}"
    (commands,) = blocks("README.md", "## Quick install", "sh")
    machine.shell(replaced(commands, replacements), env)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    machine = FreshInstall(tmp_path_factory.mktemp("readme"), livekit_locations())
    replacements = on_this_machine(machine)
    module, synapse, livekit = (
        yaml.safe_load(replaced(block, replacements))
        for block in blocks("README.md", "### Steps", "yaml")
    )
    (check,) = blocks("README.md", "### Steps", "sh")
    with machine.running():
        packages_before = machine.packages()
        install(machine, replacements, {**machine.homeserver_yaml(), **module, **synapse})
        machine.livekit.extra_config.update(livekit)
        machine.livekit.restart()
        machine.synapse.stop()
        machine.start_synapse()
        alice, bob = machine.register("alice"), machine.register("bob")
        room_id = alice.create_room(preset="public_chat")
        bob.join(room_id)
        yield Followed(machine, packages_before, replaced(check, replacements), alice, bob, room_id)


def test_readme_installation_changes_no_installed_package(followed: Followed) -> None:
    after = followed.machine.packages()
    assert followed.packages_before - after == set()
    assert {package.partition("==")[0] for package in after - followed.packages_before} >= {
        "synapse-lk-jwt",
        "livekit-api",
    }


def test_readme_installation_keeps_the_secret_to_the_user_of_synapse(followed: Followed) -> None:
    secret = followed.machine.etc / "livekit_secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_readme_steps_end_with_the_log_line_that_they_name(followed: Followed) -> None:
    assert SERVING in section("README.md", "### Steps")
    line = f"{SERVING}{MATRIX}/"
    machine = followed.machine
    machine.synapse.wait_until(lambda: line in machine.synapse_log(), line)


def test_readme_check_finds_nothing_wrong(followed: Followed) -> None:
    report = followed.machine.shell(followed.check)
    summary = report.strip().rpartition("\n")[2]
    assert re.fullmatch(r"\d+ ok, 0 warnings, 0 problems", summary), report


def resembles(shown: Any, answer: Any) -> bool:
    """Whether an answer is as shown. A string with `…` stands for any other string."""
    if isinstance(shown, dict) and isinstance(answer, dict):
        return shown.keys() == answer.keys() and all(
            resembles(value, answer[key]) for key, value in shown.items()
        )
    if isinstance(shown, str) and "…" in shown:
        return isinstance(answer, str) and bool(answer)
    return bool(shown == answer)


def test_readme_requests_get_the_answers_that_are_shown(followed: Followed) -> None:
    done = followed.verify(followed.alice)
    assert len(done) == 4
    different = [
        (command, answer)
        for command, shown, answer in done
        if not resembles(json.loads(shown), json.loads(answer))
    ]
    assert different == []


def test_readme_tokens_of_two_users_carry_audio_both_ways(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = followed.machine
    # LiveKit's client has no other way to trust the certificate of nginx.
    monkeypatch.setenv("SSL_CERT_FILE", str(machine.directory / "tls.crt"))
    url = machine.nginx.url(SFU).replace("https:", "wss:")

    async def call() -> None:
        alice = await Participant.join(url, followed.livekit_token(followed.alice))
        bob = await Participant.join(url, followed.livekit_token(followed.bob))
        await alice.publish_tone()
        await bob.publish_tone()
        await asyncio.gather(alice.hear(bob.identity), bob.hear(alice.identity))
        await alice.leave()
        await bob.leave()

    asyncio.run(call())
