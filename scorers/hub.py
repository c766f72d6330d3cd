"""Where a model lies: a path is itself, and a name is a folder in the cache of the Hugging Face hub.

    hf://owner/name              the revision "main" as it was when it was fetched
    hf://owner/name@revision     a branch, a tag, or a commit, which never moves

What is in the cache is used as it is, without a look at the network; what is missing is fetched, as far as the network
and HF_HUB_OFFLINE allow: weights (safetensors), tokenizer, configuration, the owner's code, which runs only where a
recipe says so; never a pickle. The driver of a run asks first, for the fingerprint, so its workers find everything.
HF_HOME moves the cache, HF_TOKEN opens a gated model.
"""

from fnmatch import fnmatch
from pathlib import Path

from storage.errors import RecipeError

SCHEME = "hf://"
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""Files that a model is made of: weights and their index; configurations, vocabularies, merges, chat template; code."""
LEFT_OUT = ("*/*", "consolidated*")
"""Other forms of the same weights: subfolders (onnx/, original/), the Mistral format."""


def local(path: str) -> str:
    """`path` as this machine's file system knows it. A name is fetched where the cache lacks it.

    RecipeError when there is no such model, or none in the cache and no way to it.
    """
    if not path.startswith(SCHEME):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = path.removeprefix(SCHEME).partition("@")
    asked = {
        "repo_id": name,
        "revision": revision or None,
        "allow_patterns": list(PATTERNS),
        "ignore_patterns": list(LEFT_OUT),
    }
    try:
        try:
            return str(snapshot_download(**asked, local_files_only=True))
        except LocalEntryNotFoundError:
            return str(snapshot_download(**asked))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise RecipeError(
            f"{path!r} is not in the cache of the hub, and the hub cannot be reached; fetch it where there is a "
            f"network (hf download {name}{' --revision ' + revision if revision else ''}), or name a folder"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecipeError(
            f"{path!r} cannot be had from the hub ({reason}); correct the name or its revision"
        ) from error


def files(path: str) -> list[Path]:
    """The files that a model is made of, in name order: a file, all of a folder, or what is fetched of a named one.

    RecipeError when there are none.
    """
    target = Path(local(path))
    found = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    if path.startswith(SCHEME):  # another program may have put more of the repository beside it
        names = [p.relative_to(target).as_posix() for p in found]
        found = [p for p, name in zip(found, names, strict=True) if _of_a_model(name)]
    if not found or not found[0].exists():
        raise RecipeError(f"no file or folder {path!r}; correct the path")
    return found


def _of_a_model(name: str) -> bool:
    def match(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    return match(PATTERNS) and not match(LEFT_OUT)
