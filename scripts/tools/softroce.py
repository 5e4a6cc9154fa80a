"""Boots a small virtual machine with a Soft-RoCE device and runs a command inside it.

    scripts/dev softroce .venv/bin/pytest tests/unit/transfer
    scripts/dev softroce --timeout 120 ibv_devinfo

The guest is Debian's own kernel under QEMU's plain emulation, and sees this machine's files: the same
checkout, the same .venv. What it writes lands in its memory and goes with it. The command runs in the same
directory, as root, with PATH, HOME and LANG alone. Its output is streamed (stdout and stderr together) and
its exit status is this script's; 124 says that the time was up, 125 that the guest could not be started or
ended by itself.

The kernel, its modules and the initramfs are kept in .cache/softroce. The Debian packages that are missing
are installed when this runs as root, and named otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "softroce"
PACKAGE_OF = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "rdma": "iproute2",
    "ibv_devinfo": "ibverbs-utils",
}
VERBS_PROVIDER = Path("/etc/libibverbs.d/rxe.driver")  # of the package ibverbs-providers
# rxe refuses a device without crc32, and crc32_generic is what offers it.
MODULES = [
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
    "crc32_generic",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
]
KEPT = ("PATH", "HOME", "LANG")  # of the environment
EXIT_PORT = (
    0xF4  # a byte written to it ends QEMU at once, and says nothing on the console as a power-off would
)
TIME_IS_UP, NO_GUEST = 124, 125

INIT = """\
#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
for word in $(cat /proc/cmdline); do
  case $word in softroce.script=*) script=${word#*=} ;; esac
done
# The host's files below, the guest's memory above: whatever is written stays in the guest.
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower
mount -t tmpfs tmpfs /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /merged
for folder in dev proc sys; do mount --move "/$folder" "/merged/$folder"; done
exec switch_root /merged /bin/sh "$script"
"""

GUEST = """\
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /run
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
stty -F /dev/ttyS0 -opost 2>/dev/null
hostname softroce
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0
cd {directory} || exit
env {environment} {command} < /dev/null
echo $? > /dev/ttyS1
stty -F /dev/ttyS0 sane  # waits until all is sent
stty -F /dev/ttyS1 sane
printf '\\001' | dd of=/dev/port bs=1 seek={exit_port} 2>/dev/null
"""


class GuestError(Exception):
    """The guest cannot be started; the message says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, boot included [900]")
    parser.add_argument("--memory", type=int, default=4096, help="MiB of the guest [4096]")
    parser.add_argument("--cpus", type=int, default=2, help="processors of the guest [2]")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the `finally`
    try:
        install_missing()
        kernel, initramfs = boot_files()
        return run(kernel, initramfs, options)
    except GuestError as error:
        print(f"softroce: {error}", file=sys.stderr)
        return NO_GUEST


def install_missing() -> None:
    packages = [package for tool, package in PACKAGE_OF.items() if find(tool) is None]
    if not VERBS_PROVIDER.exists():
        packages.append("ibverbs-providers")
    if not packages:
        return
    if os.geteuid() != 0 or find("apt-get") is None:
        raise GuestError(f"install these of Debian's packages: {' '.join(packages)}")
    print(f"softroce: installing {' '.join(packages)}", file=sys.stderr)
    output("apt-get", "update", "-qq")
    output("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages)


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


def output(*command: str, directory: Path = ROOT) -> str:
    result = subprocess.run(
        [find(command[0]) or command[0], *command[1:]],
        cwd=directory,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise GuestError(f"{shlex.join(command)} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def boot_files() -> tuple[Path, Path]:
    """The kernel and its initramfs, made when they are missing or this file's recipe has changed."""
    recipe = hashlib.sha256(" ".join([INIT, *MODULES]).encode()).hexdigest()[:12]
    made = CACHE / recipe
    if not made.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh = make_boot_files(Path(folder))
            try:
                fresh.rename(made)
            except OSError:  # another run was faster
                if not made.is_dir():
                    raise
    return made / "vmlinuz", made / "initramfs"


def make_boot_files(folder: Path) -> Path:
    depends = output("apt-cache", "depends", "linux-image-amd64")
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    if package is None:
        raise GuestError("apt knows no linux-image-amd64: apt-get update, on Debian")
    print(f"softroce: fetching {package[1]}", file=sys.stderr)
    output("apt-get", "download", "-qq", package[1], directory=folder)
    (archive,) = folder.glob("*.deb")
    output("dpkg", "-x", archive.name, ".", directory=folder)
    (version,) = (path.name for path in (folder / "lib" / "modules").iterdir())
    output("depmod", "-b", str(folder), version)

    tree = folder / "tree"
    for name in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "merged"):
        (tree / name).mkdir(parents=True)
    shutil.copy(find("busybox") or "", tree / "bin" / "busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    modules: dict[str, None] = {}
    for name in MODULES:
        shown = output("modprobe", "-d", str(folder), "-S", version, "--show-depends", name)
        modules |= {line.split()[1]: None for line in shown.splitlines() if line.startswith("insmod ")}
    for path in modules:
        shutil.copy(path, tree / "modules")
    (tree / "modules" / "order").write_text("".join(f"{Path(path).name}\n" for path in modules))

    made = folder / "made"
    made.mkdir()
    shutil.copy(folder / "boot" / f"vmlinuz-{version}", made / "vmlinuz")
    files = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with (made / "initramfs").open("wb") as initramfs:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"],
            cwd=tree,
            input=files.encode(),
            stdout=initramfs,
            check=True,
        )
    return made


def run(kernel: Path, initramfs: Path, options: argparse.Namespace) -> int:
    """Boots the guest, streams what it says, and returns the command's exit status."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as folder:
        script, status = Path(folder, "guest.sh"), Path(folder, "status")
        script.write_text(
            GUEST.format(
                directory=shlex.quote(os.getcwd()),
                environment=shlex.join(f"{name}={os.environ[name]}" for name in KEPT if name in os.environ),
                command=shlex.join(options.command),
                exit_port=EXIT_PORT,
            )
        )
        guest = subprocess.Popen(
            qemu_command(kernel, initramfs, script, status, options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches this script alone, which then ends the guest
        )
        time_is_up = threading.Event()

        def stop() -> None:
            time_is_up.set()
            guest.kill()

        timer = threading.Timer(options.timeout, stop)
        timer.start()
        try:
            stream(guest)
        finally:
            timer.cancel()
            guest.kill()
            guest.wait()
        if time_is_up.is_set():
            print(f"softroce: ended after {options.timeout:g} s", file=sys.stderr)
            return TIME_IS_UP
        answer = status.read_text().strip() if status.exists() else ""
        if not answer.isdecimal():
            raise GuestError("the guest ended before the command did")
        return int(answer)


def qemu_command(
    kernel: Path, initramfs: Path, script: Path, status: Path, options: argparse.Namespace
) -> list[str]:
    # A comma ends a value of QEMU's options; doubled it is one.
    return [
        find("qemu-system-x86_64") or "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi"),
        *("-cpu", "max", "-smp", str(options.cpus), "-m", str(options.memory)),
        *("-display", "none", "-monitor", "none", "-no-reboot"),
        *("-serial", "stdio", "-serial", f"file:{str(status).replace(',', ',,')}"),
        *("-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", f"console=ttyS0 quiet panic=-1 softroce.script={script}"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,multidevs=remap,readonly=on"),
        *("-netdev", "user,id=net0,restrict=on,ipv6=off", "-device", "virtio-net-pci,netdev=net0"),
        *("-device", "virtio-rng-pci"),
        *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
    ]


def stream(guest: subprocess.Popen[bytes]) -> None:
    """Everything the guest prints, as it comes, without the carriage returns of a serial line."""
    assert guest.stdout is not None
    while chunk := os.read(guest.stdout.fileno(), 1 << 16):
        sys.stdout.buffer.write(chunk.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    raise SystemExit(main())
