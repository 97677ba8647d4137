"""Signatures of adapter versions: the exact bytes that are signed, and which signatures are valid."""

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from graft.artifacts.signing import (
    DOMAIN,
    KeysInvalid,
    KeyUnknown,
    SignatureInvalid,
    Statement,
    document,
    generate,
    key_id,
    published_keys,
    read_keys,
    sign,
    trusted_keys,
    verify,
)

STATEMENT = Statement("team-a", "support", "1.0.0", "s3://graft/team-a/adapters/support/1.0.0/", "sha256:" + "ab" * 32)


def pem(seed: int) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(private: bytes) -> bytes:
    key = load_pem_private_key(private, None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


KEYS = read_keys({"2026-01-01.key": pem(1)})


def test_the_bytes_that_are_signed_never_change() -> None:
    """A golden test: if one byte changes, every stored signature becomes invalid."""
    assert STATEMENT.to_bytes() == (
        b"graft.dev/adapter-signature/v1\n"
        b'{"adapter":"support","digest":"sha256:' + b"ab" * 32 + b'","namespace":"team-a",'
        b'"uri":"s3://graft/team-a/adapters/support/1.0.0/","version":"1.0.0"}'
    )
    signature = sign(KEYS, STATEMENT)
    assert signature == sign(KEYS, STATEMENT)
    assert (signature.key_id, signature.value) == (
        "34750f98bd59fcfc",
        "yAllgaO+byeZ/HSj3o+CaMMh/k3UqG0g2cO+jig+oiTDp4LDNS2B4L1x7DQ3nvooFgSSHXA9Rn6dIYNGEtjxDg==",
    )


def test_a_signature_verifies_only_with_the_key_that_made_it() -> None:
    signature, other = sign(KEYS, STATEMENT), read_keys({"a.key": pem(2)})
    verify(signature, STATEMENT, KEYS.public)
    with pytest.raises(KeyUnknown, match="not trusted"):
        verify(signature, STATEMENT, other.public)
    with pytest.raises(SignatureInvalid, match="does not match support"):
        verify(signature, STATEMENT, {KEYS.key_id: other.public[other.key_id]})


@pytest.mark.parametrize("field", ["namespace", "adapter", "version", "uri", "digest"])
def test_a_signature_is_valid_for_one_statement_only(field: str) -> None:
    other = replace(STATEMENT, **{field: getattr(STATEMENT, field) + "1"})
    with pytest.raises(SignatureInvalid):
        verify(sign(KEYS, STATEMENT), other, KEYS.public)


@pytest.mark.parametrize("value", ["", "no base64!", base64.b64encode(b"short").decode(), "A" * 88])
def test_a_malformed_signature_is_refused(value: str) -> None:
    with pytest.raises(SignatureInvalid):
        verify(sign(KEYS, STATEMENT).model_copy(update={"value": value}), STATEMENT, KEYS.public)


def test_a_signature_without_the_domain_prefix_is_refused() -> None:
    bare = base64.b64encode(KEYS.private.sign(STATEMENT.to_bytes().removeprefix(DOMAIN))).decode()
    with pytest.raises(SignatureInvalid):
        verify(sign(KEYS, STATEMENT).model_copy(update={"value": bare}), STATEMENT, KEYS.public)


def test_the_private_key_with_the_last_name_signs_and_all_keys_verify() -> None:
    old, new, gone = pem(1), pem(2), pem(3)
    keys = read_keys(
        {"2026-06-01.key": new, "2026-01-01.key": old, "2025-01-01.pub": public_pem(gone), "notes.txt": b"x"}
    )
    assert keys.key_id == read_keys({"a.key": new}).key_id
    assert len(keys.public) == 3
    for private in (old, new, gone):
        verify(sign(read_keys({"a.key": private}), STATEMENT), STATEMENT, keys.public)


def encrypted() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )


def elliptic() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "no entry has a name that ends with .key"),
        ({"a.pub": public_pem(pem(1))}, "no entry has a name that ends with .key"),
        ({"a.key": b"SECRETWORD"}, "a.key is not an Ed25519 private key"),
        ({"a.key": encrypted()}, "without a password"),
        ({"a.key": elliptic()}, "a.key is not an Ed25519 private key"),
        ({"a.key": pem(1), "b.pub": pem(1)}, "b.pub is not an Ed25519 public key"),
    ],
)
def test_invalid_keys_are_named_but_not_quoted(entries: dict[str, bytes], words: str) -> None:
    with pytest.raises(KeysInvalid, match=words) as caught:
        read_keys(entries)
    assert "SECRETWORD" not in str(caught.value) and "BEGIN" not in str(caught.value)
    assert caught.value.__context__ is None  # the error of the parser might quote the key


def test_the_repr_of_keys_does_not_show_the_private_key() -> None:
    assert "private" not in repr(KEYS) and "Ed25519PrivateKey" not in repr(KEYS)
    assert read_keys({"a.key": generate()}) != read_keys({"a.key": generate()})
    assert read_keys({"a.key": pem(1)}) == read_keys({"b.key": pem(1)})


def test_public_keys_are_read_from_a_configmap_and_wrong_ones_are_dropped() -> None:
    other = read_keys({"a.key": pem(2)}).public
    (mine,) = other.values()
    data = published_keys(KEYS.public)
    assert trusted_keys(data) == KEYS.public
    wrong = {
        KEYS.key_id: base64.b64encode(mine).decode(),
        "x": "%",
        "é": "é",
        key_id(b""): "",
        key_id(b"s" * 31): base64.b64encode(b"s" * 31).decode(),
    }
    assert trusted_keys(wrong) == {}


def test_the_stored_document_can_be_verified_by_itself() -> None:
    content = json.loads(document(STATEMENT, sign(KEYS, STATEMENT)))
    assert content["schemaVersion"] == 1 and content["keyId"] == KEYS.key_id
    assert Statement(**content["statement"]) == STATEMENT
    assert document(STATEMENT, sign(KEYS, STATEMENT)) == document(STATEMENT, sign(KEYS, STATEMENT))
