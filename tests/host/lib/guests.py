"""Guests of one boot sector each: they boot in milliseconds and do one thing.

Each writes a `G` to the debug console (port 0xe9) when it has been loaded, so that a scenario can see that the guest runs
and count how often it was booted. The bytes are 16-bit code for address 0x7c00; the source is beside them.
"""

from pathlib import Path

IMAGE_BYTES = 1 << 20


def _code(listing: str) -> bytes:
    """The bytes of a listing: hex up to `;`, the instruction after it."""
    return b"".join(bytes.fromhex(line.split(";")[0]) for line in listing.splitlines())


_HELLO = """
    fa                      ; cli
    31 c0                   ; xor ax, ax
    8e d8                   ; mov ds, ax
    8e d0                   ; mov ss, ax
    bc 00 7c                ; mov sp, 0x7c00
    b0 47                   ; mov al, 'G'
    e6 e9                   ; out 0xe9, al
"""

# Sleeps; wakes 18 times a second for the BIOS clock.
IDLE = _code(
    _HELLO
    + """
    fb                      ; sti
    f4                      ; hlt
    eb fd                   ; jmp back to hlt
    """
)

# Every vCPU that is there at boot spins. The boot vCPU goes to unreal mode to reach the local APIC, puts `jmp $` at 0x8000,
# and sends INIT and two SIPIs with vector 8 to all but itself. A vCPU that is plugged later stays asleep.
SPIN = _code(
    _HELLO
    + """
    0f 01 16 59 7c          ; lgdt [0x7c59]
    0f 20 c0                ; mov eax, cr0
    0c 01                   ; or al, 1
    0f 22 c0                ; mov cr0, eax
    bb 08 00                ; mov bx, 8
    8e db                   ; mov ds, bx          limit 4 GiB, and it stays when protection is left
    24 fe                   ; and al, 0xfe
    0f 22 c0                ; mov cr0, eax
    31 c0                   ; xor ax, ax
    8e d8                   ; mov ds, ax
    c7 06 00 80 eb fe       ; mov word [0x8000], 0xfeeb     jmp $
    66 be 00 03 e0 fe       ; mov esi, 0xfee00300           APIC command register
    67 66 c7 06 00 45 0c 00 ; mov dword [esi], 0x000c4500   INIT, all but self
    b9 ff ff                ; mov cx, 0xffff
    e2 fe                   ; loop $
    67 66 c7 06 08 46 0c 00 ; mov dword [esi], 0x000c4608   SIPI, vector 8
    b9 ff ff                ; mov cx, 0xffff
    e2 fe                   ; loop $
    67 66 c7 06 08 46 0c 00 ; mov dword [esi], 0x000c4608
    eb fe                   ; jmp $
    0f 00 5f 7c 00 00       ; 0x7c59: GDT of 16 bytes at 0x7c5f
    00 00 00 00 00 00 00 00 ; 0x7c5f: null
    ff ff 00 00 00 92 cf 00 ;         data, base 0, limit 4 GiB
    """
)

# Acknowledges vCPU hotplug as an operating system does through ACPI: takes note of a vCPU that came, ejects one that shall
# go, and reports both (_OST). Looks at the registers of hw/acpi/cpu_hotplug.c (docs/specs/acpi_cpu_hotplug.rst) at each
# tick of the BIOS clock. Port 0xaf00 is where `-machine pc` has them.
HOTPLUG = _code(
    _HELLO
    + """
    fb                      ; sti
    ba 00 af                ; mov dx, 0xaf00
    66 31 c0                ; xor eax, eax
    66 ef                   ; out dx, eax         a zero to the selector: the modern interface
    ee                      ; out dx, al          (the same for a QEMU that takes bytes only)
    f4                      ; next: hlt
    ba 05 af                ; mov dx, 0xaf05
    30 c0                   ; xor al, al
    ee                      ; out dx, al          select the next vCPU with an event
    ba 04 af                ; mov dx, 0xaf04
    ec                      ; in al, dx
    88 c3                   ; mov bl, al
    f6 c3 02                ; test bl, 2          plugged?
    74 08                   ; jz removed
    b0 02                   ; mov al, 2
    ee                      ; out dx, al          noted
    b1 01                   ; mov cl, 1           _OST source: device check
    e8 12 00                ; call ost
    f6 c3 04                ; removed: test bl, 4
    74 e1                   ; jz next
    b0 04                   ; mov al, 4
    ee                      ; out dx, al          noted: stays set over the eject otherwise, and hits the next vCPU
    b0 08                   ; mov al, 8
    ee                      ; out dx, al          eject
    b1 03                   ; mov cl, 3           _OST source: eject request
    e8 02 00                ; call ost
    eb d4                   ; jmp next
    ba 05 af                ; ost: mov dx, 0xaf05
    b0 01                   ; mov al, 1
    ee                      ; out dx, al          command: _OST source
    ba 08 af                ; mov dx, 0xaf08
    66 0f b6 c1             ; movzx eax, cl
    66 ef                   ; out dx, eax
    ba 05 af                ; mov dx, 0xaf05
    b0 02                   ; mov al, 2
    ee                      ; out dx, al          command: _OST status
    ba 08 af                ; mov dx, 0xaf08
    66 31 c0                ; xor eax, eax
    66 ef                   ; out dx, eax         success
    c3                      ; ret
    """
)

# Reads its disk without a pause, 32 sectors at a time, so that QEMU's block layer has work: worker threads under the
# iothread that serves the disk.
READ = _code(
    _HELLO
    + """
    fb                      ; sti
    be 1e 7c                ; next: mov si, 0x7c1e
    b4 42                   ; mov ah, 0x42
    b2 80                   ; mov dl, 0x80
    cd 13                   ; int 0x13            extended read
    fe 06 26 7c             ; inc byte [0x7c26]   the next sector
    eb f1                   ; jmp next
    10 00 20 00             ; 0x7c1e: disk address packet, 32 sectors
    00 80 00 00             ; to 0:0x8000
    01 00 00 00 00 00 00 00 ; from sector 1
    """
)

# Turns on MSI of the device 00:10.0, whose MSI capability is at 0x40, as the driver of a passed-through device would.
MSI = _code(
    _HELLO
    + """
    ba f8 0c                ; mov dx, 0xcf8
    66 b8 44 80 00 80       ; mov eax, 0x80008044
    66 ef                   ; out dx, eax
    ba fc 0c                ; mov dx, 0xcfc
    66 b8 00 00 e0 fe       ; mov eax, 0xfee00000 the address: the first vCPU
    66 ef                   ; out dx, eax
    ba f8 0c                ; mov dx, 0xcf8
    66 b8 40 80 00 80       ; mov eax, 0x80008040
    66 ef                   ; out dx, eax
    ba fc 0c                ; mov dx, 0xcfc
    66 ed                   ; in eax, dx
    66 0d 00 00 01 00       ; or eax, 0x10000     MSI enable
    66 ef                   ; out dx, eax
    fb                      ; sti
    f4                      ; hlt
    eb fd                   ; jmp back to hlt
    """
)

BY_NAME = {"idle": IDLE, "spin": SPIN, "hotplug": HOTPLUG, "read": READ, "msi": MSI}


def write(name: str, path: Path) -> Path:
    """A bootable raw disk image with guest NAME."""
    code = BY_NAME[name]
    assert len(code) <= 510, f"guest {name} is {len(code)} bytes"
    sector = code.ljust(510, b"\0") + b"\x55\xaa"
    path.write_bytes(sector.ljust(IMAGE_BYTES, b"\0"))
    return path
