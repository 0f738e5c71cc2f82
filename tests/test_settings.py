"""Settings: what is taken, what is refused and with which words, and that nothing secret is ever said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from kamiyo.errors import SettingsError
from kamiyo.settings import Environment, Settings, doubts, env_example, in_force, load_settings
from tests.conftest import ROOT

VARIABLES = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
GUIDE = ("STRIPE_WEBHOOK_SECRET", "ADMIN_API_KEY", "STRIPE_SECRET_KEY", "STRIPE_PUBLISHABLE_KEY")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No story here sees the .env of whoever runs it."""
    monkeypatch.chdir(tmp_path)


# ── Where values come from ────────────────────────────────────────────────────────────────────────────────


def test_everything_has_a_default_so_that_a_start_needs_no_settings() -> None:
    settings = load_settings()
    assert settings.webhook_secrets == ()
    assert not settings.admin_api_key.get_secret_value()
    assert settings.database_url is None
    assert settings.environment is Environment.production
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.signature_tolerance, settings.max_body_bytes) == (300, 1_048_576)


def test_the_guides_env_file_is_read_as_printed(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# Stripe Webhook Secret (CRITICAL!)\n"
        "# Get this from Stripe Dashboard or Stripe CLI\n"
        "STRIPE_WEBHOOK_SECRET=whsec_abc\n\n"
        "ADMIN_API_KEY=your_secure_admin_key_here\n\n"
        "STRIPE_SECRET_KEY=sk_test_1 \n"
        "STRIPE_PUBLISHABLE_KEY='pk_test_1'\n"
        "SOMETHING_ELSE=of the same application\n"
    )
    settings = load_settings()
    assert settings.webhook_secrets == ("whsec_abc",)
    assert settings.admin_api_key.get_secret_value() == "your_secure_admin_key_here"
    assert settings.stripe_secret_key.get_secret_value() == "sk_test_1"
    assert settings.stripe_publishable_key == "pk_test_1"


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("PORT=1111\nHOST=::\n")
    monkeypatch.setenv("PORT", "2222")
    settings = load_settings()
    assert (settings.host, settings.port) == ("::", 2222)
    assert load_settings(PORT=3333).port == 3333


@given(st.lists(st.from_regex(r"\A[!-+\--~]{1,40}\Z"), max_size=5), st.sampled_from([",", " , ", ",,", ",\t"]))
def test_several_secrets_are_separated_by_commas_and_blanks_around_them_do_not_count(
    secrets: list[str], comma: str
) -> None:
    assert load_settings(STRIPE_WEBHOOK_SECRET=f" {comma.join(secrets)},").webhook_secrets == tuple(secrets)


@pytest.mark.parametrize("blank", ["", " ", ",", " , ,"])
def test_a_blank_secret_is_no_secret(blank: str) -> None:
    assert load_settings(STRIPE_WEBHOOK_SECRET=blank).webhook_secrets == ()


@pytest.mark.parametrize("url", ["postgresql://u:p@h:5432/d", "postgres://u@h/d", "postgresql:///d?host=/run/pg"])
def test_a_postgresql_address_is_taken_and_an_empty_one_means_the_embedded_server(url: str) -> None:
    settings = load_settings(DATABASE_URL=url)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url
    assert load_settings(DATABASE_URL="").database_url is None


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg2", "postgres+asyncpg"])
def test_the_address_that_an_application_has_for_sqlalchemy_is_taken(driver: str) -> None:
    settings = load_settings(DATABASE_URL=f"{driver}://u:p+x@h:5432/d?application_name=a+b")
    assert settings.database_url is not None
    plain = driver.partition("+")[0]
    assert settings.database_url.get_secret_value() == f"{plain}://u:p+x@h:5432/d?application_name=a+b"


def test_settings_cannot_be_changed_once_they_are_read() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]  # the very thing that must not work


# ── What is refused, and how ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KAMIYO_SIGNATURE_TOLERANCE", "0"),
        ("KAMIYO_SIGNATURE_TOLERANCE", "-300"),
        ("DATABASE_URL", "mysql://u:hunter2@h/d"),
        ("DATABASE_URL", "hunter2"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("KAMIYO_ENV", "staging"),
        ("KAMIYO_WORKER", "maybe"),
        ("KAMIYO_WORKER_BATCH", "0"),
        ("KAMIYO_POOL_SIZE", "3"),
        ("KAMIYO_MAX_BODY_BYTES", "10"),
        ("KAMIYO_HANDLER_TIMEOUT", "0"),
        ("KAMIYO_HANDLER_TIMEOUT", "nan"),
        ("KAMIYO_FIRST_RETRY_DELAY", "0"),
        ("KAMIYO_FIRST_RETRY_DELAY", "inf"),
        ("KAMIYO_COMMIT_TIMEOUT", "0"),
        ("KAMIYO_LOG_LEVEL", "loud"),
        ("KAMIYO_LOG_FORMAT", "xml"),
        ("DATABASE_URL", "mysql+aiomysql://u:hunter2@h/d"),
        ("DATABASE_URL", "'postgresql://u:hunter2@h/d'"),
        ("DATABASE_URL", "postgresql://u:hunter2#@h/d"),
        ("DATABASE_URL", "postgresql://u:hunter2/@h/d"),
        ("DATABASE_URL", "postgresql://u:p@h:hunter2/d"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_name_and_what_it_takes(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    sentence = str(caught.value)
    description = Settings.model_fields[VARIABLES[variable]].description
    assert description
    assert sentence.startswith(f"{variable}: ")
    assert sentence.endswith(description)
    assert "hunter2" not in sentence
    assert len(sentence.splitlines()) == 1


def test_a_level_may_be_written_in_capitals() -> None:
    assert load_settings(KAMIYO_LOG_LEVEL="INFO").log_level == "info"


GUESSABLE, LONG_ENOUGH = "hunter2", "0f1e2d3c4b5a69788796a5b4c3d2e1f0"


@pytest.mark.parametrize(
    ("variables", "doubted"),
    [
        ({"STRIPE_WEBHOOK_SECRET": "whsec_..."}, ["STRIPE_WEBHOOK_SECRET"]),
        ({"ADMIN_API_KEY": "your_secure_admin_key_here"}, ["ADMIN_API_KEY"]),
        ({"ADMIN_API_KEY": GUESSABLE}, ["ADMIN_API_KEY"]),
        ({"ADMIN_API_KEY": LONG_ENOUGH, "STRIPE_WEBHOOK_SECRET": "whsec_" + LONG_ENOUGH}, []),
        ({"STRIPE_SECRET_KEY": "sk_test_... or sk_live_..."}, ["STRIPE_SECRET_KEY"]),
        ({"KAMIYO_WORKERS": "2"}, ["KAMIYO_WORKERS"]),
        ({"KAMIYO_WORKERS": "2", "KAMIYO_WORKER": "true"}, []),
        ({"STRIPE_WEBHOOK_SECERT": "whsec_1"}, ["STRIPE_WEBHOOK_SECERT"]),
        ({"STRIPE_API_KEY": "sk_test_1", "KAMIYO_THOROUGHNESS": "3", "PORTS": "1"}, []),
        ({"DATABASE_URL": ""}, ["DATABASE_URL"]),
        ({"DATABASE_URL": "", "KAMIYO_ENV": "development"}, []),
    ],
)
def test_what_starts_well_and_cannot_go_well_is_doubted_by_its_name_alone(
    variables: dict[str, str], doubted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith(("KAMIYO_", "STRIPE_")))]:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"DATABASE_URL": "postgresql://h/d", **variables}.items():
        monkeypatch.setenv(name, value)
    found = dict(doubts(load_settings()))
    assert list(found) == doubted
    assert not any(value in sentence for sentence in found.values() for value in variables.values() if len(value) > 4)


def test_in_production_what_the_guide_prints_counts_as_not_set_and_nothing_else_does() -> None:
    printed = {
        "STRIPE_WEBHOOK_SECRET": "whsec_..., whsec_your_webhook_secret,whsec_1",
        "STRIPE_WEBHOOK_SECRETS": '{"platform": "whsec_…", "connect": ["whsec_xxx", "whsec_2"]}',
        "ADMIN_API_KEY": "your_secure_admin_key_here",
        "STRIPE_SECRET_KEY": "sk_test_... or sk_live_...",
    }
    taken = in_force(load_settings(**printed))
    assert [(one.source, one.secret) for one in taken.signing_secrets] == [
        ("connect", "whsec_2"),
        ("webhook", "whsec_1"),
    ]
    assert (taken.admin_api_key.get_secret_value(), taken.api_keys) == ("", ())
    said = dict(doubts(load_settings(**printed)))
    assert all(
        "taken as not set" in said[name] for name in ("STRIPE_WEBHOOK_SECRET", "ADMIN_API_KEY", "STRIPE_SECRET_KEY")
    )

    own = {
        "ADMIN_API_KEY": "example-0f1e2d3c4b5a",
        "STRIPE_WEBHOOK_SECRET": "whsec_test",
        "STRIPE_SECRET_KEY": "sk_test_1",
    }
    for settings in (load_settings(**own), load_settings(**printed, KAMIYO_ENV="development")):
        assert in_force(settings) == settings


def test_a_slip_in_the_file_is_found_as_well(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KAMIYO_HANDLER=my.module\n")
    assert dict(doubts(load_settings()))["KAMIYO_HANDLER"].endswith("KAMIYO_HANDLERS is one")


@pytest.mark.parametrize(("hands", "doubted"), [("4", False), ("5", True)])
def test_too_few_connections_for_the_turns_of_a_worker_are_doubted(
    hands: str, doubted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAMIYO_POOL_SIZE", "8")
    monkeypatch.setenv("KAMIYO_WORKER_CONCURRENCY", hands)
    assert ("KAMIYO_POOL_SIZE" in dict(doubts(load_settings()))) is doubted
    monkeypatch.setenv("KAMIYO_WORKER", "false")
    assert "KAMIYO_POOL_SIZE" not in dict(doubts(load_settings()))


def test_every_wrong_variable_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(PORT="x", KAMIYO_ENV="y", DATABASE_URL="z")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "DATABASE_URL",
        "KAMIYO_ENV",
        "PORT",
    ]


# ── Secrets by their endpoint, keys by their account ──────────────────────────────────────────────────────


def test_secrets_have_the_name_of_their_endpoint_beside_those_without_one() -> None:
    settings = load_settings(
        STRIPE_WEBHOOK_SECRET="whsec_plain, whsec_a",
        STRIPE_WEBHOOK_SECRETS='{"platform": "whsec_p", "connect": ["whsec_a", " whsec_b "], "acct_1": "whsec_1"}',
    )
    by_source = [(one.source, one.secret, one.account) for one in settings.signing_secrets]
    assert by_source == [
        ("platform", "whsec_p", ""),
        ("connect", "whsec_a", ""),
        ("connect", "whsec_b", ""),
        ("acct_1", "whsec_1", "acct_1"),
        # The one that has a name as well is known by it.
        ("webhook", "whsec_plain", ""),
    ]
    assert settings.webhook_secrets == tuple(secret for _, secret, _ in by_source)
    assert settings.any_door_open


def test_keys_have_the_name_of_their_account_and_a_mode() -> None:
    settings = load_settings(
        STRIPE_SECRET_KEY="sk_test_1,rk_live_1",
        STRIPE_SECRET_KEYS='{"acct_1": ["rk_live_2", "sk_test_2"], "acct_2": "sk_live_3"}',
    )
    assert [(key.account, key.livemode, key.key[-1]) for key in settings.api_keys] == [
        *(("", False, "1"), ("", True, "1"), ("acct_1", True, "2"), ("acct_1", False, "2"), ("acct_2", True, "3"))
    ]


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("STRIPE_WEBHOOK_SECRETS", "whsec_hunter2", "JSON object"),
        ("STRIPE_WEBHOOK_SECRETS", '["whsec_hunter2"]', "JSON object"),
        ("STRIPE_WEBHOOK_SECRETS", '\'{"a": "whsec_hunter2"}\'', "without quotation marks"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": "whsec_hunter2", "a": "b"}', "twice"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": 7}', "one text or a list"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": {"b": "whsec_hunter2"}}', "one text or a list"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": []}', "one text or a list"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": [" "]}', "one text or a list"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a b": "whsec_hunter2"}', "a name is letters"),
        ("STRIPE_WEBHOOK_SECRETS", '{"reconcile": "whsec_hunter2"}', "cannot be called reconcile"),
        ("STRIPE_WEBHOOK_SECRETS", '{"a": "whsec_hunter2", "b": "whsec_hunter2"}', "a and b have the same"),
        ("STRIPE_SECRET_KEYS", "sk_live_hunter2", "JSON object"),
        ("STRIPE_SECRET_KEYS", '{"platform": "sk_live_hunter2"}', "acct_"),
        ("STRIPE_SECRET_KEYS", '{"acct_1": ["sk_live_hunter2", "rk_live_hunter2"]}', "two keys of one mode"),
        ("STRIPE_SECRET_KEY", "sk_live_hunter2,sk_live_hunter2", "two keys of one mode"),
        ("STRIPE_ACCOUNT_ID", "hunter2", "another form"),
    ],
)
def test_secrets_and_keys_that_cannot_be_meant_are_refused_with_a_sentence_that_shows_none(
    variable: str, value: str, word: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**{variable: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{variable}: ") and word in sentence and len(sentence.splitlines()) == 1
    assert "hunter2" not in sentence
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


# ── What is secret stays secret ───────────────────────────────────────────────────────────────────────────


def test_no_secret_shows_when_settings_are_printed() -> None:
    settings = load_settings(
        STRIPE_WEBHOOK_SECRET="whsec_hunter2",
        ADMIN_API_KEY="hunter2",
        STRIPE_SECRET_KEY="sk_live_hunter2",
        STRIPE_WEBHOOK_SECRETS='{"a": "whsec_b_hunter2"}',
        STRIPE_SECRET_KEYS='{"acct_1": "sk_live_hunter2"}',
        KAMIYO_EVENTBRIDGE_KEY="hunter2",
        KAMIYO_EVENTGRID_KEY="hunter2",
        DATABASE_URL="postgresql://kamiyo:hunter2@h/d",
    )
    shown = f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}"
    assert "hunter2" not in f"{shown}{settings.signing_secrets}{settings.api_keys}"


def test_whatever_is_secret_by_name_is_secret_by_type() -> None:
    for name, field in Settings.model_fields.items():
        secret = bool(re.search(r"secret|(api|bridge|grid)_key|(database|alert|hook)_urls?$", name))
        assert secret == (SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))), name


# ── The file that explains them ───────────────────────────────────────────────────────────────────────────


def test_the_example_file_names_every_variable_with_its_default_and_none_of_them_takes_effect(
    tmp_path: Path,
) -> None:
    text = env_example()
    for variable in VARIABLES:
        assert len(re.findall(rf"^# {variable}=", text, re.MULTILINE)) == 1
    assert all(line.startswith("#") for line in text.splitlines() if line)
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    assert load_settings() == Settings(**{"_env_file": None})


def test_the_example_files_defaults_are_taken_when_they_are_uncommented(tmp_path: Path) -> None:
    text = re.sub(r"^# (?=[A-Z_]+=)", "", env_example(), flags=re.MULTILINE)
    assert set(VARIABLES) == set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE))
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    assert load_settings() == Settings(**{"_env_file": None})


def test_the_example_file_in_the_repository_is_the_one_this_code_writes() -> None:
    written = subprocess.run(
        [sys.executable, "-m", "kamiyo.settings"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == written


def test_every_setting_says_what_it_is_and_the_guides_four_keep_their_names() -> None:
    assert set(GUIDE) <= set(VARIABLES)
    for name, field in Settings.model_fields.items():
        assert field.description and len(field.description) > 20, name


def test_handler_modules_are_named_with_commas_and_not_imported_by_reading_them() -> None:
    assert load_settings(KAMIYO_HANDLERS=" a.b , c,").handler_modules == ("a.b", "c")
