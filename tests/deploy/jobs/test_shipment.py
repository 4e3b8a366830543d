"""What is sent is the project and nothing else, the same bytes each time."""

import os
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest
from ray._private.runtime_env.packaging import create_package

from deploy.jobs import shipment
from deploy.jobs.shipment import pack
from deploy.session import sent_along

SENT = ["my.yaml", "rewards/mine.py", "rewards/runs/helper.py", "data/train.jsonl", ".rayignore", "keep/.gitignore"]
LEFT = [
    ".git/config", ".venv/bin/python", ".venv-gpu/x", "runs/a/model.bin", "a/__pycache__/b.pyc", "c.pyc",
    ".mypy_cache/x", "wandb/run/x", ".env", ".env.local", "deep/.netrc", "k.pem", ".ssh/id_rsa", "id_rsa",
    "deep/.env", "deep/id_ed25519.old", "deep/auth_token", ".aws/credentials", "deep/.venv",
    "secret.txt", "keep/big.bin", "out/far/x.log",
]  # fmt: skip


def lay(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_environments_runs_caches_and_secrets_stay_here(tmp_path: Path) -> None:
    lay(tmp_path, *SENT, *LEFT)
    (tmp_path / ".rayignore").write_text("secret.txt\nout/\n")
    (tmp_path / "keep/.gitignore").write_text("*.bin\n")
    (tmp_path / "outside").symlink_to(tmp_path.parent, target_is_directory=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    found = pack(tmp_path)
    assert sorted(found.sizes) == sorted(SENT)
    assert found.has("rewards/mine.py")
    assert found.has("./rewards")
    assert found.has("data/")
    assert not found.has("outside")
    assert not found.has("reward")


def test_the_same_stays_here_where_ray_packs_the_folder(tmp_path: Path) -> None:
    """`train --address`: by Ray's own packing, of the runtime environment with which the cluster is joined."""
    project, archive = tmp_path / "project", tmp_path / "sent.zip"
    lay(project, *SENT, *LEFT)
    (project / ".env").write_text("WANDB_API_KEY=canary-8f21\n")
    (project / ".rayignore").write_text("secret.txt\nout/\n")
    (project / "keep/.gitignore").write_text("*.bin\n")
    env = sent_along(str(project))
    assert env["working_dir"] == str(project)
    create_package(str(project), archive, include_gitignore=True, excludes=env["excludes"])
    with zipfile.ZipFile(archive) as packed:
        names = [name for name in packed.namelist() if not name.endswith("/")]
        assert sorted(names) == sorted(SENT)
        assert not any(b"canary-8f21" in packed.read(name) for name in names)


def test_equal_files_make_equal_archives_that_can_be_unpacked(tmp_path: Path) -> None:
    lay(tmp_path / "one", "a.py", "b/c.sh")
    (tmp_path / "one/b/c.sh").chmod(0o755)
    pack(tmp_path / "one").write(tmp_path / "first.zip")
    os.utime(tmp_path / "one/a.py", (1, 1))
    pack(tmp_path / "one").write(tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert archive.namelist() == ["a.py", "b/c.sh"]
        assert archive.getinfo("b/c.sh").external_attr >> 16 & 0o111
        assert archive.read("a.py") == b"x"
    (tmp_path / "one/a.py").write_text("y")
    pack(tmp_path / "one").write(tmp_path / "third.zip")
    assert (tmp_path / "first.zip").read_bytes() != (tmp_path / "third.zip").read_bytes()


def test_what_is_too_much_is_refused_with_the_largest_folders(tmp_path: Path) -> None:
    lay(tmp_path, "data/a.bin", "data/deep/b.bin", text="x" * 3_000)
    lay(tmp_path, "models/m.bin", text="x" * 2_000)
    lay(tmp_path, "my.yaml")
    with patch.object(shipment, "LIMIT_MB", 0.005), pytest.raises(ValueError, match="would be sent") as refused:
        pack(tmp_path)
    assert "data/ 0.0 MB, models/ 0.0 MB, my.yaml" in str(refused.value)
    assert ".rayignore" in str(refused.value)
    with patch.object(shipment, "LIMIT_MB", 0.009):
        assert pack(tmp_path).num_bytes == 8_001


def test_an_empty_folder_is_no_project(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to send"):
        pack(tmp_path)


def test_this_project_is_small_and_has_what_it_needs() -> None:
    found = pack(Path(__file__).parents[3])
    assert found.num_bytes < 20e6
    for name in ("deploy/__main__.py", "recipes/demo.yaml", "actors/controller.py"):
        assert found.has(name)
    assert not any(name.startswith((".venv", ".git/")) for name in found.sizes)
