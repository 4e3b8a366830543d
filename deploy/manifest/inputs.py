"""A name that Kubernetes refuses, or a path that the pods would not see, is told before anything is rendered."""

import re
from pathlib import Path, PurePosixPath

from actors.data.dataset import READERS
from actors.recipe.named import Named, named
from actors.recipe.schema import Recipe
from deploy.manifest.options import APP, Kind

MAX_NAME = {"job": 47, "cluster": 53}
"""KubeRay makes longer names of these, and a label ends at 63 characters."""
IMAGE = ("actors", "algorithms", "deploy", "placement", "recipes", "sync")
"""What `deploy/Dockerfile` copies of this checkout."""
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def check_name(name: str, kind: Kind, given: bool) -> str:
    """The name, or a ValueError with the fix; `given`: by --name, not by the recipe."""
    where = f"--name {name}" if given else f"name: {name}"
    if len(name) > MAX_NAME[kind]:
        raise ValueError(
            f"{where} has {len(name)} characters, and KubeRay takes {MAX_NAME[kind]} of a Ray{kind.capitalize()}; "
            f"shorten it, for instance --name {_repaired(name, kind)}"
        )
    if not DNS_1035.fullmatch(name):
        raise ValueError(
            f"{where} is no name in Kubernetes, which begins with a letter and has lower-case letters, digits and "
            f"dashes; write --name {_repaired(name, kind)}"
        )
    return name


def _repaired(name: str, kind: Kind) -> str:
    """A name like it that will do."""
    plain = re.sub(r"[^-a-z0-9]+", "-", name.lower())
    return re.sub(r"^[^a-z]+", "run-", plain)[: MAX_NAME[kind]].strip("-") or "run"


def check_paths(recipe: Recipe, path: str, mount: str, claim: str) -> None:
    """The run folder lies on the volume, and so does all that is not in the image; else a ValueError.

    A relative path is one below the image's working directory. An absolute one below that is believed: who builds an
    image of their own knows what is in it.
    """
    folder = PurePosixPath(APP) / recipe.folder
    if not _below(folder, mount):
        raise ValueError(
            f"{path}: run_dir: {folder} is not on the volume of claim '{claim}', which the pods see at {mount}, so the "
            f"run would be lost with them; set run_dir={mount}/{recipe.name}, or --mount to a folder above it"
        )
    for each in [Named("the recipe's path", path, "file"), *named(recipe)]:
        key, value, local = each.key, each.name, PurePosixPath(each.name)
        if ".." in local.parts or value.startswith("~"):
            raise ValueError(f"{key}: {value} leads out of the project; write it as an absolute path below {mount}")
        if local.is_absolute() and not (_below(local, mount) or _below(local, APP)):
            raise ValueError(
                f"{key}: the pods do not see {value}; copy it to the volume of claim '{claim}' and name it as they do, "
                f"{mount}/{local.name}"
            )
        if _is_path(each) and not local.is_absolute() and not _in_image(local, mount):
            raise ValueError(
                f"{key}: {value} is not in the image, which holds {', '.join(IMAGE)} of this checkout; put it below "
                f"recipes/ before the image is built, or on the volume of claim '{claim}' and write "
                f"{mount}/{local.name} (an image of your own may hold it: write {PurePosixPath(APP) / local})"
            )


def _in_image(local: PurePosixPath, mount: str) -> bool:
    """Or on the volume, where that is mounted below the working directory."""
    return local.parts[:1] in [(folder,) for folder in IMAGE] or _below(PurePosixPath(APP) / local, mount)


def _is_path(value: Named) -> bool:
    """Whether it is surely one: of data or of a model one that is here, or that can be no name of the hub's."""
    name = value.name
    match value.kind:
        case "file":
            return True
        case "data" if PurePosixPath(name).suffix in READERS:
            return True
    return name.startswith(".") or name.count("/") > 1 or Path(name).exists()


def _below(path: PurePosixPath, folder: str) -> bool:
    return ".." not in path.parts and path.is_relative_to(folder)
