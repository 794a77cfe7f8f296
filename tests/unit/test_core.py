# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from livekit.api import TokenVerifier, VideoGrants

from synapse_lk_jwt.api.rate_limits import address_block
from synapse_lk_jwt.auth.access import Access, Permissions, ServerList, Standing
from synapse_lk_jwt.identifiers import is_room_id, is_server_name, is_user_id
from synapse_lk_jwt.livekit.naming import (
    device_identity,
    device_member_identity,
    livekit_room_name,
    member_identity,
    user_of_device_identity,
)
from synapse_lk_jwt.livekit.ownership import ATTRIBUTE, OwnerSealer, ParticipantOwner
from synapse_lk_jwt.livekit.tokens import InvalidSignature, TokenSigner, verify_webhook_body


def test_livekit_names_are_those_of_msc4195() -> None:
    alice = "@alice:example.com"
    assert (
        livekit_room_name("!roomid:example.com", "slot1234")
        == "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"
    )
    assert member_identity(alice, "memberABC") == "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
    assert (
        device_member_identity(alice, "DEVICE123", "memberABC")
        == "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
    )
    assert device_identity(alice, "DEVICE") == "@alice:example.com:DEVICE"


@pytest.mark.parametrize(
    ("entries", "matched", "others"),
    [
        (("example.org",), ["example.org", "EXAMPLE.org"], ["a.example.org", "example.org:8448"]),
        (("Example.ORG:8448",), ["example.org:8448"], ["example.org"]),
        (("*.example.org",), ["a.example.org", "b.a.Example.org"], ["example.org"]),
        (("a?.org",), ["ab.org"], ["a.org", "abc.org"]),
        (("a.org", "b.org"), ["a.org", "b.org"], ["aaorg", "xa.org"]),
        ((), [], ["example.org"]),
        (("*",), ["example.org", "[::1]:8448"], []),
        (("**",), ["example.org"], []),
    ],
)  # fmt: skip
def test_server_list_with_names_and_globs_matches(
    entries: tuple[str, ...], matched: list[str], others: list[str]
) -> None:
    servers = ServerList(entries)
    assert all(name in servers for name in matched)
    assert not any(name in servers for name in others)


def test_permissions_of_own_users_do_not_depend_on_the_lists() -> None:
    access = Access("own.org", ServerList(("full.org",)), ServerList(("speaks.org",)))
    assert [access.permissions(s) for s in ("own.org", "full.org", "speaks.org")] == [
        Permissions(has_full_access=True, can_publish=True),
        Permissions(has_full_access=True, can_publish=False),
        Permissions(has_full_access=False, can_publish=True),
    ]


def test_permissions_of_guests_and_shadow_banned_users_are_restricted() -> None:
    access = Access("own.org", ServerList(("*",)), ServerList(("*",)))
    assert access.permissions("own.org", Standing.GUEST) == Permissions(
        has_full_access=False, can_publish=True
    )
    assert access.permissions("own.org", Standing.SHADOW_BANNED) == Permissions(
        has_full_access=False, can_publish=False
    )


def payload_of(token: str) -> bytes:
    body = token.split(".")[1]
    return urlsafe_b64decode(body + "=" * (-len(body) % 4))


@pytest.mark.parametrize("can_publish", [True, False])
def test_participant_token_holds_the_claims_that_livekit_reads(can_publish: bool) -> None:
    secret = "s" * 32
    signer = TokenSigner("APIkey", secret, lambda: 2_000_000_000_999)
    token = signer.participant_token(
        "@älice:example.org:DEVICE",
        "room",
        may_create_room=True,
        can_publish=can_publish,
        can_update_own_metadata=not can_publish,
        attributes={"key": "value"},
        lifetime_ms=60_500,
    )
    payload = payload_of(token)
    assert payload.isascii()
    assert json.loads(payload) == {
        "iss": "APIkey",
        "sub": "@älice:example.org:DEVICE",
        "nbf": 2_000_000_000,
        "exp": 2_000_000_060,
        "attributes": {"key": "value"},
        "video": {
            "room": "room",
            "roomJoin": True,
            "roomCreate": False,
            "canSubscribe": True,
            "canPublish": can_publish,
            "canPublishData": can_publish,
            "canUpdateOwnMetadata": not can_publish,
            "hidden": False,
        },
    }
    assert secret not in repr(signer)


def test_token_of_a_user_who_must_not_create_rooms_names_a_missing_room_preset() -> None:
    signer = TokenSigner("APIkey", "s" * 32, lambda: 2_000_000_000_999)

    def claims(may_create_room: bool) -> dict[str, Any]:
        token = signer.participant_token(
            "me",
            "room",
            may_create_room=may_create_room,
            can_publish=True,
            can_update_own_metadata=False,
            attributes={},
            lifetime_ms=60_000,
        )
        said: dict[str, Any] = json.loads(payload_of(token))
        return said

    preset = {"roomPreset": "synapse_lk_jwt.must_not_create"}
    assert claims(False) == {**claims(True), **preset}


def test_participant_token_is_accepted_by_livekits_verifier() -> None:
    import time

    secret = "s" * 32
    signer = TokenSigner("APIkey", secret, lambda: int(time.time() * 1000))
    verifier = TokenVerifier("APIkey", secret)
    token = signer.participant_token(
        "me",
        "room",
        may_create_room=True,
        can_publish=True,
        can_update_own_metadata=False,
        attributes={},
        lifetime_ms=60_000,
    )
    assert verifier.verify(token).identity == "me"
    claims = verifier.verify(signer.api_token(VideoGrants(room_create=True)))
    assert claims.video is not None
    assert claims.video.room_create


BODY = b'{"event": "participant_left"}'
WEBHOOK = {
    "iss": "APIkey",
    "nbf": 2_000_000_000,
    "exp": 2_000_000_300,
    "sha256": b64encode(hashlib.sha256(BODY).digest()).decode(),
}


def verify(signer: TokenSigner, authorization: str) -> None:
    signed = signer.verify_webhook(authorization)
    verify_webhook_body(signed, hashlib.sha256(BODY).digest())


@pytest.mark.parametrize("now", [1_999_999_941, 2_000_000_000, 2_000_000_359])
def test_webhook_within_its_time_is_accepted(now: int) -> None:
    signer = TokenSigner("APIkey", "s" * 32, lambda: now * 1000)
    verify(signer, jwt.encode(WEBHOOK, "s" * 32))


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer x",
        "a.b.c",
        "\udfff",
        jwt.encode(WEBHOOK, "t" * 32),
        jwt.encode(WEBHOOK, "s" * 64, algorithm="HS512"),
        jwt.encode(WEBHOOK, "", algorithm="none"),
        jwt.encode({**WEBHOOK, "iss": "another"}, "s" * 32),
        jwt.encode({**WEBHOOK, "sha256": b64encode(bytes(32)).decode()}, "s" * 32),
        jwt.encode({**WEBHOOK, "sha256": None}, "s" * 32),
        jwt.encode({**WEBHOOK, "sha256": "\ud800"}, "s" * 32),
        jwt.encode({**WEBHOOK, "exp": "soon"}, "s" * 32),
        jwt.encode({**WEBHOOK, "nbf": [1]}, "s" * 32),
        jwt.encode({**WEBHOOK, "exp": 1_999_999_000}, "s" * 32),
        jwt.encode({**WEBHOOK, "nbf": 2_000_001_000}, "s" * 32),
        jwt.encode({name: WEBHOOK[name] for name in ("iss", "sha256")}, "s" * 32),
    ],
)
def test_webhook_with_wrong_authorization_is_rejected(authorization: str) -> None:
    signer = TokenSigner("APIkey", "s" * 32, lambda: 2_000_000_000_000)
    with pytest.raises(InvalidSignature) as raised:
        verify(signer, authorization)
    assert not authorization or authorization not in str(raised.value)


OLD, NEW = "old" + "s" * 32, "new" + "s" * 32


@pytest.mark.parametrize(("key", "secret"), [("APIold", OLD), ("APInew", NEW)])
def test_webhook_signed_with_any_pair_of_the_key_file_is_accepted(key: str, secret: str) -> None:
    now = 2_000_000_001
    signer = TokenSigner("APInew", NEW, lambda: now * 1000, {"APIold": OLD})
    verify(signer, jwt.encode({**WEBHOOK, "iss": key}, secret))
    assert OLD not in repr(signer)


@pytest.mark.parametrize(
    ("key", "secret"),
    [("APIold", NEW), ("APInew", OLD), ("APIother", NEW), ("APIother", OLD)],
)
def test_webhook_signed_with_the_secret_of_another_key_is_rejected(key: str, secret: str) -> None:
    now = 2_000_000_001
    signer = TokenSigner("APInew", NEW, lambda: now * 1000, {"APIold": OLD})
    with pytest.raises(InvalidSignature):
        verify(signer, jwt.encode({**WEBHOOK, "iss": key}, secret))


@pytest.mark.parametrize("token", ["", ".", "a.b.c", "a.e30", "a.W10.b", "a.bnVsbA.b"])
def test_webhook_that_is_no_token_is_rejected_with_several_pairs(token: str) -> None:
    signer = TokenSigner("APInew", NEW, lambda: 0, {"APIold": OLD})
    with pytest.raises(InvalidSignature):
        signer.verify_webhook(token)


def test_seal_of_an_earlier_secret_is_opened() -> None:
    owner = ParticipantOwner("@me:example.org", "!room", "slot")
    sealed = OwnerSealer(OLD).seal(owner, "me")
    sealer = OwnerSealer(NEW, OLD)
    assert sealer.open(sealed, "me") == owner
    assert sealer.open(sealed, "other") is None
    assert OwnerSealer(NEW).open(sealer.seal(owner, "me"), "me") == owner
    assert OwnerSealer(NEW).open(sealed, "me") is None
    assert sealer.open({ATTRIBUTE: "AAAA"}, "me") is None


def test_seal_is_opened_with_the_same_secret_and_identity_only() -> None:
    owner = ParticipantOwner("@älice:example.org", "!room", "m.call#ROOM")
    sealer = OwnerSealer("secret")
    sealed = sealer.seal(owner, "me")
    assert sealer.open(sealed, "me") == owner
    assert sealer.open(sealed, "me#duplicate") == owner
    assert OwnerSealer("secret").open(sealed, "me") == owner
    assert OwnerSealer("another").open(sealed, "me") is None
    # It reveals nothing, not even that two seals are of the same user.
    assert sealer.seal(owner, "me") != sealed
    assert sealer.open({}, "me") is None


# All participants of the call see the seal, and may copy it into their own attributes.
@pytest.mark.parametrize("other", ["you", "me2", "m", "you#me", ""])
def test_seal_is_not_opened_with_another_identity(other: str) -> None:
    sealer = OwnerSealer("secret")
    sealed = sealer.seal(ParticipantOwner("@a:example.org", "!room", "m.call#ROOM"), "me")
    assert sealer.open(sealed, other) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda value: "",
        lambda value: "é",
        lambda value: "====",
        lambda value: value[:-4],
        lambda value: value[1:],
        lambda value: "A" + value,
        lambda value: value[:-5] + "AAAAA",
    ],
)
def test_seal_that_was_changed_is_not_opened(change: Callable[[str], str]) -> None:
    sealer = OwnerSealer("secret")
    sealed = sealer.seal(ParticipantOwner("@a:example.org", "!room", "m.call#ROOM"), "me")
    assert sealer.open({ATTRIBUTE: change(sealed[ATTRIBUTE])}, "me") is None


@pytest.mark.parametrize(
    ("identity", "user"),
    [
        ("@a:b.org:DEVICE", "@a:b.org"),
        ("@a:b.org:", "@a:b.org"),
        ("@a:b.org:123", "@a:b.org"),
        ("@a:b.org:8448:DEVICE", "@a:b.org:8448"),
        ("@a:b.org:8448:", "@a:b.org:8448"),
        ("@a:[::1]:DEVICE", "@a:[::1]"),
        ("@a:[::1]:8448:DE:VICE", "@a:[::1]:8448"),
        ("@a:b.org:DE\nVICE#duplicate", "@a:b.org"),
        ("@a:b.org", None),
        ("O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc", None),
        ("", None),
    ],
)
def test_user_of_device_identity_is_found(identity: str, user: str | None) -> None:
    assert user_of_device_identity(identity) == user


@pytest.mark.parametrize(
    "name", ["example.org", "a", "example.org:8448", "1.2.3.4", "[::1]", "[::1]:8448", "A-b.org"]
)
def test_server_name_that_is_valid_is_accepted(name: str) -> None:
    assert is_server_name(name)
    assert is_user_id(f"@alice:{name}")
    assert is_user_id(f"@alice:{name}", of_server=name)
    assert not is_user_id(f"@alice:{name}", of_server="other.org")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a_b", "a%b", "é.org", "a:", "a:b", "a:0", "a:-1", "a:+1", "a: 1", "a:1 ",
     "a:1_0", "a:65536", "a:٣", "[", "[]", "[::1", "::1", "a/b", "a\n", "a..b", "[1.2.3.4]"],
)  # fmt: skip
def test_server_name_that_is_invalid_is_rejected(name: str) -> None:
    assert not is_server_name(name)
    assert not is_user_id(f"@alice:{name}")


@pytest.mark.parametrize(
    "user_id", [None, 1, "", "@", "alice:a.org", "@alice", "@a\0:a.org", "@\ud800:a.org"]
)
def test_user_id_that_is_invalid_is_rejected(user_id: object) -> None:
    assert not is_user_id(user_id)


@pytest.mark.parametrize(("length", "is_valid"), [(248, True), (249, False)])
def test_user_id_has_255_bytes_at_most(length: int, is_valid: bool) -> None:
    assert is_user_id(f"@{'x' * length}:a.org") is is_valid


@pytest.mark.parametrize(
    ("room_id", "is_valid"),
    [
        ("!room:example.org", True),
        ("!hash-of-an-event", True),
        ("!", False),
        ("#alias:example.org", False),
    ],
)
def test_room_id_of_each_form_is_valid_or_not(room_id: str, is_valid: bool) -> None:
    assert is_room_id(room_id) is is_valid


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_identifiers_with_control_characters_are_rejected(code: int, position: int) -> None:
    name = f"{'abcd'[:position]}{chr(code)}{'abcd'[position:]}"
    assert not is_room_id(f"!{name}")
    assert not is_room_id(f"!{name}:example.com")
    assert not is_user_id(f"@{name}:example.com")
    assert not is_user_id(f"@user:{name}.com")
    assert not is_server_name(f"{name}.com")


def test_room_ids_in_the_field_are_accepted() -> None:
    assert is_room_id("!room:example.com")
    # Room version 12, and a room ID of an old server.
    assert is_room_id("!Mcp5I2l1zrsXJWEyr2QPhDPPWlzPqSC7cyQ")
    assert is_room_id("!räum ü:example.com")


@pytest.mark.parametrize(
    "name",
    ["a" * 64, f"{'a' * 64}.example", "-a.example", "a-.example", "a.-", "-:8448", "a.b-:8448"],
)
def test_server_names_that_cannot_be_looked_up_are_rejected(name: str) -> None:
    assert not is_server_name(name)


@pytest.mark.parametrize("name", ["a" * 63, "a-b.example:8448", "1.2.3.4", "[::1]:8448", "xn--a"])
def test_server_names_that_may_be_looked_up_are_accepted(name: str) -> None:
    assert is_server_name(name)


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:a00:1", "10.0.0.1"),
        ("/run/synapse.sock", "/run/synapse.sock"),
        ("", ""),
    ],
)
def test_address_block_is_the_network_that_one_client_has(address: str, block: str) -> None:
    assert address_block(address) == block


def test_seal_has_a_fresh_random_nonce() -> None:
    sealer = OwnerSealer("secret")
    owner = ParticipantOwner("@a:b", "!room:b", "slot")
    nonces = [urlsafe_b64decode(sealer.seal(owner, "me")[ATTRIBUTE])[:12] for _ in range(100)]
    assert len(set(nonces)) == 100
    # No part repeats, as the part of a process or the digits of a counter would.
    assert len({nonce[:6] for nonce in nonces}) == 100


def test_seal_without_issuer_is_opened() -> None:
    sealer = OwnerSealer("secret")
    text = json.dumps(["me", "@a:b", "!room:b", "slot"]).encode()
    sealed = bytes(12) + sealer._cipher.encrypt(bytes(12), text, None)
    owner = sealer.open({ATTRIBUTE: urlsafe_b64encode(sealed).decode()}, "me")
    assert owner == ParticipantOwner("@a:b", "!room:b", "slot", None)


def test_seal_names_the_homeserver_that_issued_the_token() -> None:
    sealer = OwnerSealer("secret")
    owner = ParticipantOwner("@a:b", "!room:b", "slot", "c")
    assert sealer.open(sealer.seal(owner, "me"), "me") == owner


@pytest.mark.parametrize(
    ("issuer", "is_issued", "concerns"),
    [("here", True, True), (None, True, True), ("there", False, False)],
)
def test_owner_of_remote_user_concerns_the_issuer_of_the_token(
    issuer: str | None, is_issued: bool, concerns: bool
) -> None:
    owner = ParticipantOwner("@user:elsewhere", "!room", "slot", issuer)
    assert (owner.is_issued_by("here"), owner.concerns("here")) == (is_issued, concerns)


def test_owner_of_local_user_with_a_foreign_issuer_concerns_this_homeserver() -> None:
    owner = ParticipantOwner("@user:here", "!room", "slot", "there")
    assert (owner.is_issued_by("here"), owner.concerns("here")) == (False, True)
