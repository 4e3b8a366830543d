"""Values are on no command line, and a secret is named and never sent."""

import subprocess

import pytest

from deploy.jobs.variables import command_line, is_secret, secrets, settings


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "judge_password", "DB_PASS", "KEY"])
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)
    with pytest.raises(ValueError, match=f"--secret {name}"):
        settings([name], {name: "s3cret"})


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "WANDB_MODE", "HF_HUB_OFFLINE", "KEYBOARD", "PASSAGE"])
def test_a_setting_travels_with_its_value(name: str) -> None:
    assert settings([name], {name: "1", "OTHER": "2"}) == {name: "1"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("A=s3cret", "--env A: write the name alone"),
        ("MISSING", "--env MISSING: is not set here"),
        ("1A", "no name of a variable"),
        ("A B", "no name of a variable"),
        ("", "no name of a variable"),
        ("RAY_ADDRESS", "Ray's own"),
    ],
)
def test_a_bad_setting_is_refused_and_no_value_is_repeated(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        settings([name], {"A": "s3cret"})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("name", ["A=s3cret", "$(id)", "RAY_AUTH_TOKEN"])
def test_a_bad_secret_is_refused_and_no_value_is_repeated(name: str) -> None:
    with pytest.raises(ValueError, match="--secret") as refused:
        secrets([name])
    assert "s3cret" not in str(refused.value)


def run(command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin"} | env
    return subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=20, check=False)


def test_a_job_without_its_secret_ends_with_2_and_one_with_it_runs() -> None:
    command = command_line(["echo", "it's", "$MY_KEY", "a b"], ["MY_KEY"])
    without, with_it = run(command, {}), run(command, {"MY_KEY": "s3cret"})
    assert (without.returncode, without.stdout) == (2, "")
    assert "error: --secret MY_KEY: is not set on the cluster's head" in without.stderr
    assert (with_it.returncode, with_it.stdout) == (0, "it's $MY_KEY a b\n")
    assert "s3cret" not in with_it.stdout + with_it.stderr
