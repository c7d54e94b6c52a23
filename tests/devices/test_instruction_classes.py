"""Which class the plugin puts an instruction in. The encodings are what GNU as 2.44 makes of the texts beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgevlm.devices.instructions import CLASSES, find_plugin_source

# By class, in the order of the plugin's columns: encodings and what they are.
ENCODINGS: dict[str, dict[int, str]] = {
    "int8 dot product": {
        0x4E829420: "sdot v0.4s, v1.16b, v2.16b",
        0x2E829420: "udot v0.2s, v1.8b, v2.8b",
        0x4FA2E820: "sdot v0.4s, v1.16b, v2.4b[3]",
        0x6F9DE3DF: "udot v31.4s, v30.16b, v29.4b[0]",
        0x4E829C20: "usdot v0.4s, v1.16b, v2.16b",
        0x4FA2F020: "usdot v0.4s, v1.16b, v2.4b[1]",
        0x4F22F020: "sudot v0.4s, v1.16b, v2.4b[1]",
        0x6E42FC20: "bfdot v0.4s, v1.8h, v2.8h",
        0x4F62F020: "bfdot v0.4s, v1.8h, v2.2h[1]",
    },
    "int8 matrix multiply": {
        0x4E82A420: "smmla v0.4s, v1.16b, v2.16b",
        0x6E82A420: "ummla v0.4s, v1.16b, v2.16b",
        0x4E82AC20: "usmmla v0.4s, v1.16b, v2.16b",
        0x6E42EC20: "bfmmla v0.4s, v1.8h, v2.8h",
    },
    "float32 multiply-add": {
        0x4E22CC20: "fmla v0.4s, v1.4s, v2.4s",
        0x4EE2CC20: "fmls v0.2d, v1.2d, v2.2d",
        0x4FA21820: "fmla v0.4s, v1.4s, v2.s[3]",
        0x4FC25820: "fmls v0.2d, v1.2d, v2.d[1]",
        0x5FA21020: "fmla s0, s1, v2.s[1]",
        0x1F020C20: "fmadd s0, s1, s2, s3",
        0x1F628C20: "fnmsub d0, d1, d2, d3",
    },
    "float16 multiply-add": {
        0x4E420C20: "fmla v0.8h, v1.8h, v2.8h",
        0x0EC20C20: "fmls v0.4h, v1.4h, v2.4h",
        0x4F321820: "fmla v0.8h, v1.8h, v2.h[7]",
        0x1FC20C20: "fmadd h0, h1, h2, h3",
        0x4E22EC20: "fmlal v0.4s, v1.4h, v2.4h",
        0x6E22CC20: "fmlal2 v0.4s, v1.4h, v2.4h",
        0x4EA2EC20: "fmlsl v0.4s, v1.4h, v2.4h",
        0x6EA2CC20: "fmlsl2 v0.4s, v1.4h, v2.4h",
        0x4F920020: "fmlal v0.4s, v1.4h, v2.h[1]",
        0x6F928020: "fmlal2 v0.4s, v1.4h, v2.h[1]",
        0x4F924020: "fmlsl v0.4s, v1.4h, v2.h[1]",
        0x6F92C020: "fmlsl2 v0.4s, v1.4h, v2.h[1]",
    },
    "integer SIMD multiply": {
        0x4E629C20: "mul v0.8h, v1.8h, v2.8h",
        0x4EA29420: "mla v0.4s, v1.4s, v2.4s",
        0x6E229420: "mls v0.16b, v1.16b, v2.16b",
        0x4F528020: "mul v0.8h, v1.8h, v2.h[1]",
        0x6FA20020: "mla v0.4s, v1.4s, v2.s[1]",
        0x6F524020: "mls v0.8h, v1.8h, v2.h[1]",
        0x0E22C020: "smull v0.8h, v1.8b, v2.8b",
        0x6E22C020: "umull2 v0.8h, v1.16b, v2.16b",
        0x0E628020: "smlal v0.4s, v1.4h, v2.4h",
        0x6E628020: "umlal2 v0.4s, v1.8h, v2.8h",
        0x0E62A020: "smlsl v0.4s, v1.4h, v2.4h",
        0x0F52A020: "smull v0.4s, v1.4h, v2.h[1]",
        0x4F522020: "smlal2 v0.4s, v1.8h, v2.h[1]",
        0x2F522020: "umlal v0.4s, v1.4h, v2.h[1]",
        0x4EA2B420: "sqdmulh v0.4s, v1.4s, v2.4s",
        0x6EA2B420: "sqrdmulh v0.4s, v1.4s, v2.4s",
        0x4F52C020: "sqdmulh v0.8h, v1.8h, v2.h[1]",
        0x4FA2D020: "sqrdmulh v0.4s, v1.4s, v2.s[1]",
        0x0E62D020: "sqdmull v0.4s, v1.4h, v2.4h",
        0x0F523020: "sqdmlal v0.4s, v1.4h, v2.h[1]",
        0x6E828420: "sqrdmlah v0.4s, v1.4s, v2.4s",
        0x6FA2D020: "sqrdmlah v0.4s, v1.4s, v2.s[1]",
    },
    "other SIMD": {
        0x6E22DC20: "fmul v0.4s, v1.4s, v2.4s",
        0x4FA29020: "fmul v0.4s, v1.4s, v2.s[1]",
        0x6FA29020: "fmulx v0.4s, v1.4s, v2.s[1]",
        0x4E22D420: "fadd v0.4s, v1.4s, v2.4s",
        0x4E22F420: "fmax v0.4s, v1.4s, v2.4s",
        0x6E82CC20: "fcmla v0.4s, v1.4s, v2.4s, #90",
        0x6F823820: "fcmla v0.4s, v1.4s, v2.s[1], #90",
        0x6F623020: "fcmla v0.8h, v1.8h, v2.h[1], #90",
        0x4EA28420: "add v0.4s, v1.4s, v2.4s",
        0x6E229C20: "pmul v0.16b, v1.16b, v2.16b",
        0x0E22E020: "pmull v0.8h, v1.8b, v2.8b",
        0x0E220020: "saddl v0.8h, v1.8b, v2.8b",
        0x4E606820: "sadalp v0.4s, v1.8h",
        0x4EA2BC20: "addp v0.4s, v1.4s, v2.4s",
        0x4E226420: "smax v0.16b, v1.16b, v2.16b",
        0x1EE22820: "fadd h0, h1, h2",
        0x1E222820: "fadd s0, s1, s2",
        0x1E620820: "fmul d0, d1, d2",
        0x4E21D820: "scvtf v0.4s, v1.4s",
        0x4E21A820: "fcvtns v0.4s, v1.4s",
        0x0E214820: "sqxtn v0.8b, v1.8h",
        0x4E020020: "tbl v0.16b, {v1.16b}, v2.16b",
        0x4E040C20: "dup v0.4s, w1",
        0x4F000400: "movi v0.4s, #0",
        0x1E260020: "fmov w0, s1",
        0x4E823820: "zip1 v0.4s, v1.4s, v2.4s",
        0x4F3D0420: "sshr v0.4s, v1.4s, #3",
        0x1E212000: "fcmp s0, s1",
        0x4E284820: "aese v0.16b, v1.16b",
        0x2EC2FC20: "bfmlalb v0.4s, v1.8h, v2.8h",
        0x0FD2F020: "bfmlalb v0.4s, v1.8h, v2.h[1]",
    },
    "SIMD load and store": {
        0x3DC00020: "ldr q0, [x1]",
        0xACC10440: "ldp q0, q1, [x2], #32",
        0x4C007020: "st1 {v0.16b}, [x1]",
        0x4D40C820: "ld1r {v0.4s}, [x1]",
        0x0D409020: "ld1 {v0.s}[1], [x1]",
        0x6D0027E8: "stp d8, d9, [sp]",
    },
    "load and store": {
        0xF9400020: "ldr x0, [x1]",
        0xA9407BFD: "ldp x29, x30, [sp]",
        0x39000C20: "strb w0, [x1, #3]",
        0xC85F7C20: "ldxr x0, [x1]",
        0xF8200041: "ldadd x0, x1, [x2]",
        0x18000000: "ldr w0, .",
    },
    "SVE": {
        0x65A20020: "fmla z0.s, p0/m, z1.s, z2.s",
        0xA540A000: "ld1w {z0.s}, p0/z, [x0]",
        0x44820020: "sdot z0.s, z1.b, z2.b",
        0x2598E3E0: "ptrue p0.s",
    },
    "branch": {
        0x14000000: "b .",
        0x94000000: "bl .",
        0xD65F03C0: "ret",
        0xB4000000: "cbz x0, .",
        0x37180000: "tbnz x0, #3, .",
        0x54000000: "b.eq .",
        0xD4000001: "svc #0",
        0xD503201F: "nop",
        0xD53BD040: "mrs x0, tpidr_el0",
    },
    "other": {
        0x8B020020: "add x0, x1, x2",
        0x9B020C20: "madd x0, x1, x2, x3",
        0x1AC20C20: "sdiv w0, w1, w2",
        0xD28000A0: "mov x0, #5",
        0x9A820020: "csel x0, x1, x2, eq",
        0x90000000: "adrp x0, .",
        0xD37EF420: "lsl x0, x1, #2",
    },
}

# Compiled with the plugin's own text: reads encodings, prints the number of each one's class.
READER = """
#define CLASSES_ONLY
#include "{source}"
int main(void) {{ unsigned word; while (scanf("%x", &word) == 1) printf("%d\\n", class_of(word)); return 0; }}
"""


@pytest.fixture(scope="module")
def classes_of(tmp_path_factory):
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "reader.c").write_text(READER.format(source=find_plugin_source()))
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", folder / "reader", folder / "reader.c"], check=True)

    def read(words) -> list[str]:
        text = "\n".join(f"{word:08x}" for word in words)
        done = subprocess.run([folder / "reader"], input=text, capture_output=True, text=True, check=True)
        return [CLASSES[int(line)] for line in done.stdout.split()]

    return read


@pytest.mark.parametrize("name", CLASSES)
def test_instructions_are_in_their_class(name, classes_of):
    expected = dict.fromkeys(ENCODINGS[name].values(), name)
    assert dict(zip(ENCODINGS[name].values(), classes_of(ENCODINGS[name]), strict=True)) == expected


def test_every_class_is_tried():
    assert tuple(ENCODINGS) == CLASSES


def test_the_plugin_compiles_without_a_warning(tmp_path: Path):
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", tmp_path / "count.so"]
    subprocess.run([*command, find_plugin_source()], check=True)


def test_the_plugin_says_what_its_licence_is():
    source = find_plugin_source()
    assert "SPDX-License-Identifier: GPL-2.0-or-later" in source.read_text()
    assert "GPL-2.0-or-later" in (source.parent / "LICENCE.md").read_text()
