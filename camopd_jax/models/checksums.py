"""SHA-256 checksums of the weights of an exported folder, which `sha256sum --check SHA256SUMS` reads too."""

import hashlib
from pathlib import Path

from camopd_jax.errors import UserError
from camopd_jax.runtime.progress import work

FILE = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    (folder / FILE).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def check_checksums(folder: Path) -> None:
    """Compares the files with their checksums; does nothing in a folder without checksums.

    Raises:
      UserError: naming the file that differs or is missing.
    """
    if not (folder / FILE).exists():
        return
    for line in (folder / FILE).read_text(errors="replace").splitlines():
        checksum, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not file.is_file() or sha256(file) != checksum:
            raise UserError(
                f"{file}: not the file whose checksum {FILE} has, so it is damaged or was replaced; export or fetch it "
                f"again, or delete {folder / FILE} if the change was intended"
            )


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with file.open("rb") as stream, work(f"checksum of {file.name}"):
        return hashlib.file_digest(stream, "sha256").hexdigest()
