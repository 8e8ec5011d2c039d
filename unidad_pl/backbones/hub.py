"""Models by name: what lies at a path, else what Hugging Face's cache has of that id, else a download into the cache.

Only what is read is fetched: configs and tokenizers first, and where those are of a known model, one file of weights of
each network. Nothing is asked of the network for what the cache has.
"""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from unidad_pl.backbones.weights import Stems, choose_weights, find_weights, parts_of
from unidad_pl.files import expanded

SMALL = (".json", ".txt", ".jinja")
"""Endings of configs, tokenizers and indices of weights."""
TOPS = ("model_index.json", "config.json", "unet/config.json")
"""Every model's folder has one of them."""


def find_folder(
    path: str,
    folders: Collection[str],
    needed: Callable[[Path], Mapping[str, Stems]],
    local_files_only: bool = False,
) -> Path:
    """The folder ``path`` (``~`` is the home folder), or where the cache keeps the model of that id.

    A model that the cache does not have whole is downloaded, with a progress bar, by one process of a machine; others
    wait for it.

    Args:
        path: a folder, or OWNER/NAME.
        folders: those within a model's whose configs and tokenizers are read; ``""`` is the model's own.
        needed: checks the configs in a model's folder and tells which weights must be there: folder within it -> names
            without suffix. Raises FileNotFoundError if a config is missing, ValueError if it is of no known model.
        local_files_only: nothing is downloaded.

    Returns:
        The folder. Where nothing may be downloaded, there may be files missing in it.

    Raises:
        FileNotFoundError: there is none, and what to do.
        PermissionError: the model is gated, or the cache cannot be written.
        ConnectionError: it cannot be downloaded, and why.
        ValueError: as of ``needed``.
    """
    if (given := expanded(path)).exists():
        return given
    if not _is_id(path):
        raise FileNotFoundError(_absent(path, "no folder, and no OWNER/NAME of a model on Hugging Face"))
    found = _cached_folder(path)
    if found is not None and _is_whole(found, needed):
        return found
    if setting := _offline(local_files_only):
        if found is None:
            reason = f"neither a folder nor in Hugging Face's cache, and {setting} is set: nothing is downloaded"
            raise FileNotFoundError(_absent(path, reason))
        return found
    with _in_turn(path):
        found = _cached_folder(path)
        if found is None or not _is_whole(found, needed):  # by another process meanwhile
            found = _download(path, folders, needed)
    return found


def find_file(path: str, local_files_only: bool = False) -> Path:
    """The file ``path``, or OWNER/NAME/FILE of Hugging Face: what the cache has of it, else it is downloaded.

    Returns:
        The file; ``path`` where it is neither.

    Raises:
        PermissionError, ConnectionError: as of :func:`find_folder`.
    """
    given = expanded(path)
    owner, name, file = [*path.split("/", 2), "", ""][:3]
    model = f"{owner}/{name}"
    if given.exists() or not file or not _is_id(model):
        return given
    if (found := _cached(model, file)) is not None:
        return found
    if not _offline(local_files_only):
        with _in_turn(model), suppress(FileNotFoundError):
            if file in _names(model):
                return _fetched(model, [file]) / file
    return given


def _is_whole(folder: Path, needed: Callable[[Path], Mapping[str, Stems]]) -> bool:
    with suppress(FileNotFoundError):
        for part, stems in needed(folder).items():
            parts_of(find_weights(folder / part, stems))
        return True
    return False


def _download(model: str, folders: Collection[str], needed: Callable[[Path], Mapping[str, Stems]]) -> Path:
    """The folder in the cache, once what is missing in it has come."""
    names = _names(model)
    small = [name for name in names if name.rpartition("/")[0] in folders and name.endswith(SMALL)]
    if not small:
        raise FileNotFoundError(f"the model {model!r} on Hugging Face has no config: it is none that diffusers saves")
    folder = _fetched(model, small)
    chosen = []
    for part, stems in needed(folder).items():
        place = f"{part}/" if part else ""
        inside = {name.removeprefix(place) for name in names if name.rpartition("/")[0] == part}
        file = choose_weights(inside, stems)
        if file is None:
            raise FileNotFoundError(
                f"the model {model!r} on Hugging Face has neither {place}{stems[0]}.safetensors nor "
                f"{place}{stems[1]}.bin: take another one"
            )
        chosen += [f"{place}{name}" for name in parts_of(folder / part / file, inside)]
    return _fetched(model, [*small, *chosen]) if chosen else folder


def _names(model: str) -> list[str]:
    """All files of a model on the hub. No attempt is repeated: whoever cannot reach the hub learns it at once."""
    from huggingface_hub import HfApi, constants

    with _in_words(model):
        info = HfApi().model_info(model, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()]


def _fetched(model: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _in_words(model):
        return Path(snapshot_download(model, allow_patterns=[glob.escape(name) for name in names]))


def _cached(model: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None


def _cached_folder(model: str) -> Path | None:
    found = ((_cached(model, name), name.count("/")) for name in TOPS)
    return next((file.parents[depth] for file, depth in found if file is not None), None)


def _is_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(HFValidationError):
        validate_repo_id(text)
        return True
    return False


def _offline(local_files_only: bool) -> str | None:
    """The setting that forbids downloads."""
    from huggingface_hub import constants

    return "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None


@contextmanager
def _in_turn(model: str) -> Iterator[None]:
    """One process of a machine at a time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{model.replace('/', '--')}" / "unidad.lock"
    with _in_words(model):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        yield


@contextmanager
def _in_words(model: str) -> Iterator[None]:
    """Whatever goes wrong on the way to Hugging Face and back is one sentence with a way out."""
    try:
        yield
    except Exception as error:
        raise _refusal(model, error) from error


def _refusal(model: str, error: Exception) -> OSError:
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if _is_gated(error):
        return PermissionError(
            f"source model {model!r} is gated: accept its terms at {constants.ENDPOINT}/{model} with your account, "
            f"then run 'hf auth login' here, or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        reason = "neither a folder nor a model on Hugging Face that can be seen from here"
        return FileNotFoundError(f"{_absent(model, reason)}; for a private one run 'hf auth login' first")
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return PermissionError(
            f"source model {model!r} cannot be stored in Hugging Face's cache {constants.HF_HUB_CACHE} "
            f"({_in_a_line(error)}): set HF_HOME to a folder with room that may be written"
        )
    reason = f"neither a folder nor in Hugging Face's cache, and cannot be downloaded ({_in_a_line(error)})"
    return ConnectionError(
        f"{_absent(model, reason)}; or see to the network (HTTPS_PROXY, HF_ENDPOINT) and your token ('hf auth login')"
    )


def _is_gated(error: Exception) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _absent(path: str, reason: str) -> str:
    return (
        f"source model {path!r} is {reason} (--model.source.init_args.path): put the model's diffusers folder there, "
        f"as 'hf download OWNER/NAME --local-dir {path}' does where there is a network, or give an OWNER/NAME that "
        f"'hf download OWNER/NAME' has put into the cache"
    )
