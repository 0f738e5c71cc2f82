"""Signatures, judged beside Stripe's own library: `stripe.WebhookSignature.verify_header` is the oracle."""

import hmac
from typing import Any

import pytest
import stripe
from hypothesis import example, given
from hypothesis import strategies as st

from kamiyo.errors import SignatureError, SignatureMissing
from kamiyo.signature import TOLERANCE_SECONDS, sign, verify

SECRET = "whsec_one"
NOW = 1_800_000_000.0
# The oracle reads the body as text; Stripe's bodies are UTF-8.
bodies = st.text().map(str.encode)
keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
timestamps = st.integers(0, 10**11)
words = st.text("0123456789abcdef=vt,+-_. ", max_size=80)


def oracle_accepts(body: bytes, header: str, secret: str) -> bool:
    """Whether Stripe's library believes it, whatever its age."""
    try:
        return bool(stripe.WebhookSignature.verify_header(body, header, secret, tolerance=None))
    except stripe.SignatureVerificationError:
        return False


def we_accept(body: bytes, header: str, secret: str, **how: Any) -> bool:
    """Whether we believe it, whatever its age."""
    try:
        verify(body, header, [secret], how.get("now", NOW), tolerance=how.get("tolerance", 10**13))
    except SignatureError:
        return False
    return True


def reason_of(body: bytes, header: str | bytes | None, *secrets: str, now: float = NOW) -> str:
    with pytest.raises(SignatureError) as caught:
        verify(body, header, secrets, now)
    return caught.value.reason


# ── Beside the oracle ─────────────────────────────────────────────────────────────────────────────────────


@given(bodies, keys, timestamps)
def test_stripes_library_believes_what_we_sign(body: bytes, secret: str, at: int) -> None:
    assert oracle_accepts(body, sign(body, secret, at), secret)


@given(bodies, keys, timestamps)
def test_we_believe_what_stripes_library_signs(body: bytes, secret: str, at: int) -> None:
    header = stripe.WebhookSignature.generate_signature_header(body.decode(), secret, at)
    assert we_accept(body, header, secret, now=at)


@given(bodies, keys, timestamps)
def test_our_header_is_the_oracles_letter_for_letter(body: bytes, secret: str, at: int) -> None:
    assert sign(body, secret, at) == stripe.WebhookSignature.generate_signature_header(body.decode(), secret, at)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, str]:
    """A body, and a header made of right and wrong parts in any order."""
    body = draw(bodies)
    at = draw(st.integers(1, 10**10))
    good = sign(body, SECRET, at).split(",")
    junk = st.one_of(
        # Not "v1" or "t" alone, nor a letter beyond ASCII: the oracle falls over them.
        st.sampled_from(["v1=", "t=", "v0=6ffbb59b", "=", "", "v1=00", "t=1", "T=1", f"v1={'0' * 64}"]),
        st.builds(lambda stamp: f"t={stamp}", st.integers(0, 10**13)),
        st.builds("{}={}".format, st.sampled_from(["v0", "v1", "v2", "t"]), words.filter(lambda w: "," not in w)),
        st.just(sign(body, "whsec_other", at).split(",")[1]),
        st.just(sign(body + b".", SECRET, at).split(",")[1]),
    )
    parts = draw(st.permutations(good + draw(st.lists(junk, max_size=6))))
    return body, ",".join(parts[draw(st.integers(0, 1)) :])


@given(headers())
@example((b"", f"t=1,t=5,{sign(b'', SECRET, 5).split(',')[1]}"))
def test_whatever_we_believe_stripes_library_believes(case: tuple[bytes, str]) -> None:
    # Not the other way round: the library's int() also takes "+5", "5_0" and spaces for a time stamp.
    body, header = case
    if we_accept(body, header, SECRET):
        assert oracle_accepts(body, header, SECRET)


@given(
    bodies,
    st.lists(keys, min_size=1, max_size=4, unique=True),
    st.lists(keys, max_size=4),
    timestamps,
    st.data(),
)
def test_any_of_our_secrets_may_have_signed_and_the_answer_says_which(
    body: bytes, ours: list[str], strangers: list[str], at: int, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, len(ours) - 1))
    strangers = [secret for secret in strangers if secret not in ours]
    parts = data.draw(st.permutations([sign(body, key, at).split(",")[1] for key in [ours[which], *strangers]]))
    header = ",".join([f"t={at}", *parts])
    assert ours[verify(body, header, ours, at)] == ours[which]
    assert oracle_accepts(body, header, ours[which])


@given(bodies, keys, keys, timestamps)
def test_another_secret_is_refused(body: bytes, secret: str, other: str, at: int) -> None:
    header = sign(body, secret, at)
    if other != secret:
        assert not we_accept(body, header, other, now=at)


@given(st.binary(min_size=1), st.data())
def test_one_changed_bit_of_the_body_is_refused(body: bytes, data: st.DataObject) -> None:
    header = sign(body, SECRET, int(NOW))
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert we_accept(body, header, SECRET)
    assert reason_of(bytes(changed), header, SECRET) == "no_match"


@given(st.data())
def test_one_changed_letter_of_the_signature_or_the_time_is_refused(data: st.DataObject) -> None:
    header = sign(b"{}", SECRET, int(NOW))
    at = data.draw(
        st.sampled_from([i for i, letter in enumerate(header) if letter in "0123456789abcdef" and header[i - 1] != "v"])
    )
    other = data.draw(st.sampled_from([letter for letter in "0123456789abcdef" if letter != header[at]]))
    assert not we_accept(b"{}", header[:at] + other + header[at + 1 :], SECRET)


# ── Age ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_a_signature_is_good_for_the_tolerance_either_way_and_not_a_second_longer(age: int, tolerance: int) -> None:
    header = sign(b"{}", SECRET, int(NOW) - age)
    if abs(age) <= tolerance:
        verify(b"{}", header, [SECRET], NOW, tolerance)
    else:
        with pytest.raises(SignatureError) as caught:
            verify(b"{}", header, [SECRET], NOW, tolerance)
        assert caught.value.reason == ("too_old" if age > 0 else "too_new")


def test_the_tolerance_is_stripes_five_minutes() -> None:
    assert TOLERANCE_SECONDS == stripe.Webhook.DEFAULT_TOLERANCE == 300
    header = sign(b"{}", SECRET, int(NOW))
    verify(b"{}", header, [SECRET], NOW + 300)
    assert reason_of(b"{}", header, SECRET, now=NOW + 301) == "too_old"
    assert reason_of(b"{}", header, SECRET, now=NOW - 301) == "too_new"


def test_a_forged_signature_is_no_match_however_old_so_that_too_old_always_speaks_of_a_true_one() -> None:
    assert reason_of(b"{}", f"t=1,v1={'0' * 64}", SECRET) == "no_match"


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("header", [None, "", b""])
def test_no_header_is_missing(header: str | bytes | None) -> None:
    with pytest.raises(SignatureMissing) as caught:
        verify(b"{}", header, [SECRET], NOW)
    assert (caught.value.reason, caught.value.status) == ("missing", 400)
    assert caught.value.detail == "Missing Stripe signature header"


@pytest.mark.parametrize(
    "header",
    [
        "x",
        "t=1",
        "v1=00",
        "t=,v1=00",
        "t=-1,v1=00",
        "t=1e9,v1=00",
        "t= 1,v1=00",
        "t=1,v0=00",
        ",,,",
        "t=٣,v1=00",
        f"t={'9' * 5000},v1=00",
    ],
)
def test_a_header_that_is_not_stripes_is_malformed(header: str) -> None:
    assert reason_of(b"{}", header, SECRET) == "malformed"


def test_only_v1_counts_however_right_the_others_are() -> None:
    right = sign(b"{}", SECRET, int(NOW)).split("v1=")[1]
    assert reason_of(b"{}", f"t={int(NOW)},v0={right},v2={right}", SECRET) == "malformed"


def test_spaces_after_the_commas_are_a_proxys_doing_and_do_no_harm() -> None:
    assert we_accept(b"{}", sign(b"{}", SECRET, int(NOW)).replace(",", ", "), SECRET)


def test_without_a_secret_nothing_is_believed() -> None:
    assert reason_of(b"{}", sign(b"{}", "", int(NOW))) == "no_match"


@given(st.one_of(st.none(), st.text(), st.binary()), st.binary())
def test_any_header_and_any_body_come_to_a_reason_and_never_to_another_error(
    header: str | bytes | None, body: bytes
) -> None:
    assert reason_of(body, header, SECRET) in ("missing", "malformed", "no_match")


def test_the_answer_of_every_wrong_signature_is_the_same() -> None:
    header = sign(b"{}", SECRET, int(NOW))
    details = set()
    for wrong, now in [("t=1,v1=00", NOW), ("x", NOW), (header, NOW + 1000), (header, NOW - 1000)]:
        with pytest.raises(SignatureError) as caught:
            verify(b"{}", wrong, [SECRET], now)
        details.add((caught.value.status, caught.value.detail))
    assert details == {(400, "Invalid signature")}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every signature that is compared from now on."""
    seen: list[bytes] = []
    honest = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        seen.append(other)
        return honest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    return seen


def test_every_signature_is_compared_in_constant_time_even_after_one_matched(compared: list[bytes]) -> None:
    right = sign(b"{}", SECRET, int(NOW))
    verify(b"{}", f"{right},v1=aa,v1=bb", [SECRET], NOW)
    assert compared == [right.split("v1=")[1].encode(), b"aa", b"bb"]


def test_a_header_of_a_megabyte_costs_no_more_than_one_of_sixteen_signatures(compared: list[bytes]) -> None:
    assert reason_of(b"{}", f"t={int(NOW)}," + "v1=0," * 200_000, SECRET) == "no_match"
    assert len(compared) == 16
