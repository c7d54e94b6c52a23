/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Counts the AArch64 instructions that a program executes, by class, for QEMU's user mode (plugin API 1, QEMU 7.2).
 *
 *   gcc -O2 -fPIC -shared -o count_instructions.so count_instructions.c
 *   qemu-aarch64 -plugin ./count_instructions.so,out=counts.txt program
 *
 * The program says where to look by the system call prctl(0x4d41524b, label, 0, 0, 0), which Linux refuses. Each one
 * appends a line to the file: the label, then how many instructions of each class ran since the last one.
 *
 * Every instruction is in one class. Encodings: Arm Architecture Reference Manual for A-profile (DDI 0487), C4.1.
 * Which is which was checked with an assembler: tests/devices/test_instruction_classes.py.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* QEMU's interface, as far as it is used here. */
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*translation_callback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*syscall_callback)(qemu_plugin_id_t, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2,
                                 uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translation_callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, syscall_callback);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

#define EXPORTED __attribute__((visibility("default")))

enum { PRCTL = 167, MARK = 0x4d41524b };

/* The order of the columns; edgevlm/devices/instructions.py names them. */
enum kind {
    DOT_PRODUCT,       /* [su]dot, usdot, sudot, bfdot */
    MATRIX_MULTIPLY,   /* [su]mmla, usmmla, bfmmla */
    FMA_FP32,          /* fmla, fmls, fmadd ... of float and double */
    FMA_FP16,          /* the same of half, and fmlal, fmlsl */
    INTEGER_MULTIPLY,  /* SIMD: mul, mla, mull, mlal and their saturating kin */
    SIMD_OTHER,        /* the other SIMD and floating-point arithmetic */
    SIMD_LOAD_STORE,
    LOAD_STORE,
    SVE_SME,
    BRANCH,            /* and system instructions */
    OTHER,             /* arithmetic in the general registers */
    N_CLASSES
};

static bool is(uint32_t word, uint32_t mask, uint32_t value) { return (word & mask) == value; }

/* "Data processing -- scalar floating-point and advanced SIMD". */
static enum kind simd_class(uint32_t w)
{
    uint32_t size = w >> 22 & 3;

    if (is(w, 0xff000000, 0x1f000000)) /* three registers added: fmadd, fmsub, fnmadd, fnmsub */
        return size == 3 ? FMA_FP16 : FMA_FP32;

    if (is(w, 0x9f000400, 0x0f000000) || is(w, 0xdf000400, 0x5f000000)) { /* by element: vector, scalar */
        uint32_t opcode = w >> 12 & 15;
        bool u = w >> 29 & 1, is_vector = !(w >> 28 & 1);
        if (!u && (opcode == 1 || opcode == 5))
            return size == 0 ? FMA_FP16 : FMA_FP32;
        if (is_vector && size == 2 && (u ? opcode == 8 || opcode == 12 : opcode == 0 || opcode == 4))
            return FMA_FP16; /* fmlal, fmlsl, fmlal2, fmlsl2 */
        if (is_vector && size == 2 && opcode == 14)
            return DOT_PRODUCT; /* sdot, udot */
        if (is_vector && !u && opcode == 15 && size != 3)
            return DOT_PRODUCT; /* sudot, bfdot, usdot */
        if (opcode == 9 || (u && (opcode & 9) == 1) || (!u && opcode == 15))
            return SIMD_OTHER; /* fmul and fmulx, fcmla, bfmlalb and bfmlalt */
        return INTEGER_MULTIPLY;
    }
    if (is(w, 0x9f200400, 0x0e200400)) { /* three of the same */
        uint32_t opcode = w >> 11 & 31;
        bool u = w >> 29 & 1;
        if (!u && opcode == 0x19)
            return FMA_FP32; /* fmla, fmls */
        if (u ? opcode == 0x19 && !(size & 1) : opcode == 0x1d && !(size & 1))
            return FMA_FP16; /* fmlal2, fmlsl2; fmlal, fmlsl */
        if (opcode == 0x12 || (opcode == 0x13 && !u) || opcode == 0x16)
            return INTEGER_MULTIPLY; /* mla, mls, mul, sqdmulh, sqrdmulh */
        return SIMD_OTHER;
    }
    if (is(w, 0xbf20f400, 0x2e008400)) /* sqrdmlah, sqrdmlsh */
        return INTEGER_MULTIPLY;
    if (is(w, 0xbf60fc00, 0x0e400c00)) /* three of the same, half: fmla, fmls */
        return FMA_FP16;
    if (is(w, 0x9fe0fc00, 0x0e809400) || is(w, 0xbfe0fc00, 0x0e809c00) || is(w, 0xbfe0fc00, 0x2e40fc00))
        return DOT_PRODUCT; /* sdot, udot; usdot; bfdot */
    if (is(w, 0x9fe0fc00, 0x0e80a400) || is(w, 0xbfe0fc00, 0x0e80ac00) || is(w, 0xbfe0fc00, 0x2e40ec00))
        return MATRIX_MULTIPLY; /* smmla, ummla; usmmla; bfmmla */
    if (is(w, 0x9f200c00, 0x0e200000)) { /* three different */
        uint32_t opcode = w >> 12 & 15;
        return opcode >= 8 && opcode <= 13 ? INTEGER_MULTIPLY : SIMD_OTHER; /* [su]mlal, mlsl, mull, sqdmull ... */
    }
    return SIMD_OTHER;
}

static enum kind class_of(uint32_t w)
{
    uint32_t op0 = w >> 25 & 15;

    if (op0 == 2 || (op0 == 0 && w >> 31))
        return SVE_SME;
    if ((op0 & 5) == 4)
        return w >> 26 & 1 ? SIMD_LOAD_STORE : LOAD_STORE;
    if ((op0 & 14) == 10)
        return BRANCH;
    if ((op0 & 7) == 7)
        return simd_class(w);
    return OTHER;
}

#ifndef CLASSES_ONLY

static uint64_t counted[N_CLASSES], told[N_CLASSES];
static FILE *out;

static void count_block(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    uint64_t n[N_CLASSES] = {0};
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        n[class_of(word)]++;
    }
    for (int each = 0; each < N_CLASSES; each++)
        if (n[each])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &counted[each], n[each]);
}

static void tell(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t option, uint64_t label, uint64_t a3,
                 uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)vcpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != PRCTL || (uint32_t)option != MARK)
        return;
    fprintf(out, "%" PRIu64, label);
    for (int each = 0; each < N_CLASSES; each++) {
        fprintf(out, " %" PRIu64, counted[each] - told[each]);
        told[each] = counted[each];
    }
    fputc('\n', out);
    fflush(out);
}

EXPORTED int qemu_plugin_version = 1;

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    (void)info;
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0 || !(out = fopen(argv[0] + 4, "w")))
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
    qemu_plugin_register_vcpu_syscall_cb(id, tell);
    return 0;
}

#endif
