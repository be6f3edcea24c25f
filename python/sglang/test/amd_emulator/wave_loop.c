/* The loop that runs a wave of an AMD code object on a CPU: each instruction is a native function that tinygrad's
   emulator compiled (kind 0), or one of those below, which that emulator lacks or gets wrong on CDNA.

   Registers of a wave: b[0] scalar, b[1] vector, b[3] LDS, b[4] scratch, b[5] accumulation. s[126..127] is EXEC and
   s[256..257] the program counter. A vector register is 64 words, one per lane. */
#include <stdint.h>
#include <string.h>
typedef uint32_t u32;
typedef uint64_t u64;
typedef void (*fn_t)(u64, u64, u64, u64, u64, u64);
/* x: decoded operands of the instructions implemented here instead of in tinygrad; kind 0 = call fn */
typedef struct {
    fn_t fn;
    u64 count, ticks;
    uint8_t g[6], flags, kind;
    int32_t x[16];
    u64 shadow;
} ent_t;
static float F8[2][256];
void set_f8(float *a, float *b) {
    memcpy(F8[0], a, 1024);
    memcpy(F8[1], b, 1024);
}
static inline u64 tsc(void) {
    unsigned a, d;
    __asm__ __volatile__("rdtsc" : "=a"(a), "=d"(d));
    return ((u64)d << 32) | a;
}
static inline u64 exec_(u32 *s) { return (u64)s[126] | ((u64)s[127] << 32); }
static inline float bf(u32 b) {
    float f;
    memcpy(&f, &b, 4);
    return f;
}
static inline u32 fb(float f) {
    u32 b;
    memcpy(&b, &f, 4);
    return b;
}
static float half(u32 h) {
    u32 s = (h >> 15) & 1, e = (h >> 10) & 31, m = h & 1023;
    float v;
    if (e == 31) return bf((s << 31) | 0x7f800000 | (m << 13));
    if (e == 0) v = (float)m * 0x1p-24f;
    else return bf((s << 31) | ((e + 112) << 23) | (m << 13));
    return s ? -v : v;
}

static u32 half_bits(float f) {
    _Float16 h = (_Float16)f;
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
}

/* x: type M N K vdst src0 src1 src2 acc_cd acc_a acc_b fmt_a fmt_b ; type 0 bf16 1 f16 2 fp8 3 i8 4 f32 */
static void mfma(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1], *A = (u32 *)b[5];
    int ty = x[0], M = x[1], N = x[2], K = x[3];
    int per = M * K / 64, vpg = ty <= 1 ? 2 : ty == 4 ? 1 : 4, nout = M * N / 64;
    static float am[32 * 256], bm[256 * 32];
    static int32_t ai[32 * 256], bi[256 * 32];
    for (int side = 0; side < 2; side++) {
        u32 *R = x[9 + side] ? A : V;
        int r0 = x[5 + side] - 256;
        for (int l = 0; l < 64; l++)
            for (int j = 0; j < per; j++) {
                u32 w = R[(r0 + j / vpg) * 64 + l];
                int sub = j % vpg, mn = l % M, k = (l / M) * per + j;
                float f = 0;
                int32_t q = 0;
                switch (ty) {
                case 0: f = bf(((w >> (16 * sub)) & 0xffff) << 16); break;
                case 1: f = half((w >> (16 * sub)) & 0xffff); break;
                case 2: f = F8[x[11 + side]][(w >> (8 * sub)) & 255]; break;
                case 3: q = (int8_t)(w >> (8 * sub)); break;
                default: f = bf(w);
                }
                if (side) {
                    bm[k * N + mn] = f;
                    bi[k * N + mn] = q;
                } else {
                    am[mn * K + k] = f;
                    ai[mn * K + k] = q;
                }
            }
    }
    u32 *D = x[8] ? A : V;
    static u32 out[16 * 64];
    static float acc[32 * 32];
    static int32_t iacc[32 * 32];
    for (int l = 0; l < 64; l++)
        for (int r = 0; r < nout; r++) {
            int n = l % N, m = M == 32 ? 8 * (r / 4) + 4 * (l / 32) + r % 4 : 4 * (l / 16) + r;
            u32 c = x[7] >= 256 ? D[(x[7] - 256 + r) * 64 + l] : s[x[7]];
            acc[m * N + n] = bf(c);
            iacc[m * N + n] = (int32_t)c;
        }
    if (ty == 3) {
        for (int m = 0; m < M; m++)
            for (int k = 0; k < K; k++) {
                int32_t a = ai[m * K + k];
                for (int n = 0; n < N; n++) iacc[m * N + n] += a * bi[k * N + n];
            }
    } else {
        for (int m = 0; m < M; m++)
            for (int k = 0; k < K; k++) {
                float a = am[m * K + k];
                for (int n = 0; n < N; n++) acc[m * N + n] += a * bm[k * N + n];
            }
    }
    for (int l = 0; l < 64; l++)
        for (int r = 0; r < nout; r++) {
            int n = l % N, m = M == 32 ? 8 * (r / 4) + 4 * (l / 32) + r % 4 : 4 * (l / 16) + r;
            out[r * 64 + l] = ty == 3 ? (u32)iacc[m * N + n] : fb(acc[m * N + n]);
        }
    memcpy(D + x[4] * 64, out, nout * 256); /* MFMA ignores EXEC */
}
static float fx(u32 v, int fmt) { /* 0 e4m3 1 e5m2 2 e2m3 3 e3m2 4 e2m1 */
    if (fmt < 2) return F8[fmt][v];
    int eb = fmt == 3 ? 3 : 2, mb = fmt == 2 ? 3 : fmt == 3 ? 2 : 1, bias = (1 << (eb - 1)) - 1;
    int e = (v >> mb) & ((1 << eb) - 1), m = v & ((1 << mb) - 1);
    float r = e ? (1.0f + m / (float)(1 << mb)) : m / (float)(1 << mb);
    int p = (e ? e : 1) - bias;
    r = p >= 0 ? r * (1 << p) : r / (1 << -p);
    return (v >> (eb + mb)) & 1 ? -r : r;
}
/* F8F6F4, optional E8M0 scale per 32 elements of K. 8-bit: a lane holds two runs of 16, K/2 apart; 6 and 4-bit: one run
   of 32. The scale of K block i comes from lane group i. x: M K vdst src0 src1 src2 acc_cd acc_a acc_b fmt_a fmt_b
   scaled sa sb sel_a|sel_b<<4 */
static void mfma_mx(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1], *A = (u32 *)b[5];
    int M = x[0], K = x[1], nout = M * M / 64;
    static float el[2][32][128], sc[2][64];
    for (int side = 0; side < 2; side++) {
        u32 *R = x[7 + side] ? A : V;
        int fmt = x[9 + side], bits = fmt < 2 ? 8 : fmt < 4 ? 6 : 4, r0 = x[3 + side] - 256;
        for (int l = 0; l < 64; l++) {
            for (int j = 0; j < 32; j++) {
                int o = j * bits, g = l / M, k = fmt < 2 ? (j / 16) * (K / 2) + 16 * g + (j & 15) : 32 * g + j;
                u64 w = R[(r0 + o / 32) * 64 + l];
                if ((o & 31) + bits > 32) w |= (u64)R[(r0 + o / 32 + 1) * 64 + l] << 32;
                el[side][l % M][k] = fx((u32)(w >> (o & 31)) & ((1u << bits) - 1), fmt);
            }
            sc[side][l] = 1.0f;
            if (x[11]) {
                int q = x[12 + side];
                u32 w = q >= 256 ? V[(q - 256) * 64 + l] : s[q];
                u32 e = (w >> (8 * ((x[14] >> (4 * side)) & 3))) & 255;
                sc[side][l] = e == 255 ? bf(0x7fc00000) : e ? bf(e << 23) : 0x1p-127f;
            }
        }
    }
    u32 *D = x[6] ? A : V;
    static u32 out[16 * 64];
    for (int l = 0; l < 64; l++)
        for (int r = 0; r < nout; r++) {
            int n = l % M, m = M == 32 ? 8 * (r / 4) + 4 * (l / 32) + r % 4 : 4 * (l / 16) + r;
            double t = 0;
            for (int g = 0; g < K / 32; g++) {
                float d = 0;
                for (int j = 0; j < 32; j++) d += el[0][m][g * 32 + j] * el[1][n][g * 32 + j];
                t += (double)d * sc[0][g * M + m] * sc[1][g * M + n];
            }
            u32 c = x[5] >= 256 ? D[(x[5] - 256 + r) * 64 + l] : s[x[5]];
            out[r * 64 + l] = fb((float)(t + bf(c)));
        }
    memcpy(D + x[2] * 64, out, nout * 256);
}
/* x: dst src */
static void permlane(u64 *b, int32_t *x, int w) {
    u32 *V = (u32 *)b[1], *d = V + x[0] * 64, *q = V + x[1] * 64;
    for (int base = 0; base < 64; base += 2 * w)
        for (int l = 0; l < w; l++) {
            u32 t = q[base + l];
            q[base + l] = d[base + l + w];
            d[base + l + w] = t;
        }
}
/* transpose read: 16 lanes x 64 bits seen as a tile of E = 64/bits rows (k) of 16 columns; lane n gets column n. x: dst
 * addr off acc bits */
static void ds_tr(u64 *b, int32_t *x) {
    u32 *V = (u32 *)b[1], *D = x[3] ? (u32 *)b[5] : V;
    uint8_t *L = (uint8_t *)b[3];
    u64 ex = exec_((u32 *)b[0]);
    int bits = x[4], E = 64 / bits;
    u64 in[64];
    for (int l = 0; l < 64; l++) memcpy(&in[l], L + V[x[1] * 64 + l] + x[2], 8);
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) {
            int g = l & ~15, n = l & 15;
            u64 o = 0;
            for (int k = 0; k < E; k++) {
                int el = k * 16 + n;
                u64 v = (in[g + el / E] >> (bits * (el % E))) & ((1ull << bits) - 1);
                o |= v << (bits * k);
            }
            D[x[0] * 64 + l] = (u32)o;
            D[(x[0] + 1) * 64 + l] = (u32)(o >> 32);
        }
}
/* Stores to LDS from accumulation registers.
   x: addr data0 data1 offset0 offset1 (bytes) bytes parts(1 or 2) shift(16: the upper half) */
static void lds_store(u64 *b, int32_t *x) {
    u32 *V = (u32 *)b[1], *A = (u32 *)b[5];
    uint8_t *L = (uint8_t *)b[3];
    u64 ex = exec_((u32 *)b[0]);
    for (int part = 0; part < x[6]; part++)
        for (int l = 0; l < 64; l++)
            if (ex >> l & 1)
                for (int o = 0; o < x[5]; o += 4) {
                    u32 v = A[(x[1 + part] + o / 4) * 64 + l] >> x[7];
                    memcpy(L + V[x[0] * 64 + l] + x[3 + part] + o, &v, x[5] - o < 4 ? x[5] - o : 4);
                }
}
/* x: dst data addr off */
static void bpermute(u64 *b, int32_t *x) {
    u32 *V = (u32 *)b[1], o[64];
    u64 ex = exec_((u32 *)b[0]);
    for (int l = 0; l < 64; l++) {
        int sl = ((V[x[2] * 64 + l] + x[3]) >> 2) & 63;
        o[l] = (ex >> sl & 1) ? V[x[1] * 64 + sl] : 0;
    }
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) V[x[0] * 64 + l] = o[l];
}
static void permute(u64 *b, int32_t *x) {
    u32 *V = (u32 *)b[1], o[64] = {0};
    u64 ex = exec_((u32 *)b[0]);
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) o[((V[x[2] * 64 + l] + x[3]) >> 2) & 63] = V[x[1] * 64 + l];
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) V[x[0] * 64 + l] = o[l];
}
/* x: dst src off16 */
static void swizzle(u64 *b, int32_t *x) {
    u32 *V = (u32 *)b[1], o[64];
    u64 ex = exec_((u32 *)b[0]);
    int f = x[2];
    for (int l = 0; l < 64; l++) {
        int sl;
        if ((f & 0xe000) == 0xc000) {
            int rot = (f >> 5) & 31, m = f & 31, q = l & 31;
            sl = (l & 32) | (q & m) | (((f & 0x400) ? q - rot : q + rot) & ~m & 31);
        } else if (f & 0x8000) sl = (l & ~3) | ((f >> (2 * (l & 3))) & 3);
        else sl = (l & 32) | ((((l & 31) & (f & 31)) | ((f >> 5) & 31)) ^ ((f >> 10) & 31));
        o[l] = (ex >> sl & 1) ? V[x[1] * 64 + sl] : 0;
    }
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) V[x[0] * 64 + l] = o[l];
}
/* DPP: permute src0 into a borrowed VGPR, narrow EXEC, run the plain form of the instruction from shadow code.
   x: src0 ctrl bc neg abs bank row tmpreg sixteen */
static void dpp(u64 *b, ent_t *e) {
    int32_t *x = e->x;
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1], save[64], o[64];
    u64 ex = exec_(s), ok = 0;
    int c = x[1];
    for (int l = 0; l < 64; l++) {
        int r = l >> 4, i = l & 15, sl = l, v = 1;
        if (c < 0x100) sl = (l & ~3) | ((c >> (2 * (l & 3))) & 3);
        else if (c <= 0x10f) {
            sl = l + (c & 15);
            v = i + (c & 15) < 16;
        } else if (c <= 0x11f) {
            sl = l - (c & 15);
            v = i >= (c & 15);
        } else if (c <= 0x12f) sl = (l & ~15) | ((i - (c & 15)) & 15);
        else if (c == 0x130) {
            sl = l + 1;
            v = l < 63;
        } else if (c == 0x134) sl = (l + 1) & 63;
        else if (c == 0x138) {
            sl = l - 1;
            v = l > 0;
        } else if (c == 0x13c) sl = (l - 1) & 63;
        else if (c == 0x140) sl = (l & ~15) | (15 - i);
        else if (c == 0x141) sl = (l & ~7) | (7 - (l & 7));
        else if (c == 0x142) {
            sl = (r - 1) * 16 + 15;
            v = r > 0;
        } else if (c == 0x143) {
            sl = 31;
            v = l >= 32;
        } else if (c >= 0x150 && c <= 0x15f) sl = (l & ~15) | (c & 15);
        int en = (x[6] >> r & 1) && (x[5] >> (i >> 2) & 1);
        if (v && !(ex >> sl & 1)) v = 0;
        u32 w = v ? V[x[0] * 64 + sl] : 0;
        if (x[4]) w &= x[8] ? 0x7fff : 0x7fffffff;
        if (x[3]) w ^= x[8] ? 0x8000 : 0x80000000u;
        o[l] = w;
        if (en && (v || x[2])) ok |= 1ull << l;
    }
    u32 *T = V + x[7] * 64;
    memcpy(save, T, 256);
    memcpy(T, o, 256);
    ok &= ex;
    s[126] = (u32)ok;
    s[127] = (u32)(ok >> 32);
    s[256] = (u32)e->shadow;
    s[257] = (u32)(e->shadow >> 32);
    e->fn(b[e->g[0]], b[e->g[1]], b[e->g[2]], b[e->g[3]], b[e->g[4]], b[e->g[5]]);
    memcpy(T, save, 256);
    s[126] = (u32)ex;
    s[127] = (u32)(ex >> 32);
}
/* Two small floats, scaled by the exponent of an f32, as wider ones: all of them are exact.
   x: vdst src0 src1 place format(as fx) result(0 f32, 1 bf16, 2 f16, 3 one f32); place: of the word, or of the byte */
static void widen(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1];
    u64 ex = exec_(s);
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) {
            u32 w = x[1] >= 256 ? V[(x[1] - 256) * 64 + l] : s[x[1]], out[2];
            u32 q = x[2] >= 256 ? V[(x[2] - 256) * 64 + l] : s[x[2]];
            int bits = x[4] == 4 ? 4 : 8, e = (q >> 23) & 255;
            float scale = e == 255 ? bf(0x7fc00000) : e ? bf((u32)e << 23) : 0x1p-127f;
            if (x[5] == 3) {
                V[x[0] * 64 + l] = fb(fx((w >> (8 * x[3])) & 255, x[4]) * scale);
                continue;
            }
            for (int i = 0; i < 2; i++) {
                float v = fx((w >> (x[3] * 2 * bits + i * bits)) & ((1u << bits) - 1), x[4]) * scale;
                if (x[5] == 0) out[i] = fb(v);
                else if (x[5] == 1) out[i] = fb(v) >> 16;
                else out[i] = half_bits(v);
            }
            if (x[5] == 0) {
                V[x[0] * 64 + l] = out[0];
                V[(x[0] + 1) * 64 + l] = out[1];
            } else V[x[0] * 64 + l] = out[0] | out[1] << 16;
        }
}
/* fma of three sources of 32 or 16 bits, subnormal ones kept.
   x: vdst src0 src1 src2 result(0 f32, 1 low f16, 2 high f16) halves(bit: the source has 16 bits) high(bit: its high
   half) abs neg */
static void fma_mix(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1];
    u64 ex = exec_(s);
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) {
            float f[3];
            for (int i = 0; i < 3; i++) {
                u32 w = x[1 + i] >= 256 ? V[(x[1 + i] - 256) * 64 + l] : s[x[1 + i]];
                f[i] = x[5] >> i & 1 ? half((x[6] >> i & 1 ? w >> 16 : w) & 0xffff) : bf(w);
                if (x[7] >> i & 1) f[i] = __builtin_fabsf(f[i]);
                if (x[8] >> i & 1) f[i] = -f[i];
            }
            float r = __builtin_fmaf(f[0], f[1], f[2]);
            u32 *d = V + x[0] * 64 + l, h = half_bits(r);
            *d = x[4] == 0 ? fb(r) : x[4] == 1 ? (*d & 0xffff0000) | h : (*d & 0xffff) | h << 16;
        }
}
/* Whether what is too large for 8 bits becomes the largest number: the bit FP16_OVFL of the mode register. */
static int saturates;

/* v, rounded to the nearest 8-bit float, ties to even. */
static u32 narrow(float v, int bf8) {
    int fnuz = F8[0][0x80] != F8[0][0x80], mb = bf8 ? 2 : 3, bias = (bf8 ? 15 : 7) + fnuz, e, sign = fb(v) >> 24 & 0x80;
    float a = __builtin_fabsf(v), most = bf8 ? 57344 : fnuz ? 240 : 448;
    u32 largest = bf8 ? (fnuz ? 0x7f : 0x7b) : fnuz ? 0x7f : 0x7e, over = fnuz ? 0x80 : bf8 ? 0x7c : 0x7f;
    if (v != v) return fnuz ? 0x80 : 0x7f | sign;
    if (a > 3e38f) return fnuz ? 0x80 : over | sign;
    e = a > 0 ? (int)(fb(a) >> 23) - 127 : -127;
    if (e < 1 - bias) e = 1 - bias;
    float unit = __builtin_ldexpf(1, e - mb), q = __builtin_rintf(a / unit);
    if (q * unit > most) return saturates ? largest | sign : fnuz ? 0x80 : over | sign;
    if (q >= 2 << mb) q /= 2, e++;
    u32 code = q < (1 << mb) ? (u32)q : (u32)(e + bias) << mb | ((u32)q - (1 << mb));
    return code | (fnuz && code == 0 ? 0 : sign);
}
/* Two numbers to 8 bits. x: vdst src0 src1 scale(-1 none) word bf8 sources(0 two f32, 1 bf16, 2 f16 in src0) */
static void to_eight_bits(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1];
    u64 ex = exec_(s);
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) {
            u32 w[2], q = x[3] < 0 ? 0x3f800000 : x[3] >= 256 ? V[(x[3] - 256) * 64 + l] : s[x[3]];
            u32 *d = V + x[0] * 64 + l;
            float f[2], scale = bf(q & 0x7f800000);
            for (int i = 0; i < 2; i++) {
                int r = x[1 + (x[6] == 0 ? i : 0)];
                w[i] = r >= 256 ? V[(r - 256) * 64 + l] : s[r];
                if (x[6]) w[i] = w[i] >> (16 * i) & 0xffff;
                f[i] = (x[6] == 0 ? bf(w[i]) : x[6] == 1 ? bf(w[i] << 16) : half(w[i])) / scale;
            }
            u32 pair = narrow(f[0], x[5]) | narrow(f[1], x[5]) << 8;
            *d = x[4] ? (*d & 0xffff) | pair << 16 : (*d & 0xffff0000) | pair;
        }
}
/* An instruction of 16 bits whose registers lie past 127, run in its form with borrowed ones: tinygrad takes such a
   number for the high half of a register, which it is on RDNA alone. x: count, (register, borrowed) each; x[13]: the
   pair that is written, or -1 */
static void borrowed(u64 *b, ent_t *e) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1], save[3 * 64];
    int32_t *x = e->x;
    for (int i = 0; i < x[0]; i++) {
        memcpy(save + 64 * i, V + x[2 + 2 * i] * 64, 256);
        memcpy(V + x[2 + 2 * i] * 64, V + x[1 + 2 * i] * 64, 256);
    }
    s[256] = (u32)e->shadow;
    s[257] = (u32)(e->shadow >> 32);
    e->fn(b[e->g[0]], b[e->g[1]], b[e->g[2]], b[e->g[3]], b[e->g[4]], b[e->g[5]]);
    if (x[13] >= 0) memcpy(V + x[1 + 2 * x[13]] * 64, V + x[2 + 2 * x[13]] * 64, 256);
    for (int i = 0; i < x[0]; i++) memcpy(V + x[2 + 2 * i] * 64, save + 64 * i, 256);
}
/* x: vdata vaddr srsrc soffset offset offen idxen lds acc bytes store kind(0 plain,1 signed,2 d16,3 d16_hi) ; kind 10+
 * atomics (x[12] = return) */
static int mubuf(u64 *b, int32_t *x) {
    u32 *s = (u32 *)b[0], *V = (u32 *)b[1], *D = x[8] ? (u32 *)b[5] : V;
    uint8_t *L = (uint8_t *)b[3];
    u64 ex = exec_(s);
    u32 *q = s + x[2];
    u64 base = (u64)q[0] | ((u64)(q[1] & 0xffff) << 32);
    u32 stride = (q[1] >> 16) & 0x3fff;
    u64 nr = q[2];
    u32 so = s[x[3]];
    if (base >> 47) base |= 0xffff000000000000ull;
    int n = x[9];
    for (int l = 0; l < 64; l++)
        if (ex >> l & 1) {
            u64 idx = x[6] ? V[x[1] * 64 + l] : 0, vo = x[5] ? V[(x[1] + (x[6] ? 1 : 0)) * 64 + l] : 0;
            u64 off = vo + (u32)x[4];
            int rec = stride && x[6];
            uint8_t *p = (uint8_t *)(base + off + so + (u64)stride * idx);
            for (int o = 0; o < n; o += 4) {
                int c = n - o < 4 ? n - o : 4;
                int in = rec ? idx < nr : off + so + o + c <= nr;
                int k = x[11];
                u32 *r = D + (x[0] + o / 4) * 64 + l;
                if (k >= 10) {
                    if (in) {
                        u32 old;
                        memcpy(&old, p, 4);
                        u32 v = *r, nw = old;
                        if (k == 10) nw = old + v;
                        else if (k == 11) nw = fb(bf(old) + bf(v));
                        else if (k == 12) nw = v;
                        else if (k == 13) nw = (int32_t)v > (int32_t)old ? v : old;
                        else if (k == 14) nw = v > old ? v : old;
                        else if (k == 15) nw = (int32_t)v < (int32_t)old ? v : old;
                        else if (k == 16) nw = v < old ? v : old;
                        else if (k == 17) nw = old & v;
                        else if (k == 18) nw = old | v;
                        else return -1;
                        memcpy(p, &nw, 4);
                        if (x[12]) *r = old;
                    } else if (x[12]) *r = 0;
                    continue;
                }
                if (x[10]) {
                    if (in) {
                        u32 v = k == 3 ? *r >> 16 : *r;
                        memcpy(p + o, &v, c);
                    }
                    continue;
                }
                u32 v = 0;
                if (in) memcpy(&v, p + o, c);
                if (k == 1) v = c == 1 ? (u32)(int32_t)(int8_t)v : (u32)(int32_t)(int16_t)v;
                if (x[7]) {
                    memcpy(L + (s[124] & 0x3ffff) + x[4] + l * n + o, &v, c < 4 && n < 4 ? 4 : c);
                    continue;
                }
                if (k == 2) *r = (*r & 0xffff0000) | (v & 0xffff);
                else if (k == 3) *r = (*r & 0xffff) | (v << 16);
                else *r = v;
            }
        }
    return 0;
}

/* 0 end of program, 1 barrier, 2 slot not compiled yet, 3 instruction limit, 4 pc outside the code object */
int run_wave(u64 *b, ent_t *tab, u64 base, u64 nslots, u64 limit, u64 *done, int timed) {
    u32 *s = (u32 *)b[0];
    u64 n = 0;
    int rc;
    for (;;) {
        u64 pc = (u64)s[256] | ((u64)s[257] << 32);
        if (pc == ~0ULL) {
            rc = 0;
            break;
        }
        u64 i = (pc - base) >> 2;
        if (i >= nslots) {
            rc = 4;
            break;
        }
        ent_t *e = &tab[i];
        if (!e->fn) {
            rc = 2;
            break;
        }
        if (n >= limit) {
            rc = 3;
            break;
        }
        u64 t0 = timed ? tsc() : 0;
        if (!e->kind) e->fn(b[e->g[0]], b[e->g[1]], b[e->g[2]], b[e->g[3]], b[e->g[4]], b[e->g[5]]);
        else {
            switch (e->kind) {
            case 1: mfma(b, e->x); break;
            case 2: permlane(b, e->x, 16); break;
            case 3: permlane(b, e->x, 32); break;
            case 4: ds_tr(b, e->x); break;
            case 5: bpermute(b, e->x); break;
            case 6: permute(b, e->x); break;
            case 7: swizzle(b, e->x); break;
            case 8: dpp(b, e); break;
            case 9: mubuf(b, e->x); break;
            case 10: mfma_mx(b, e->x); break;
            case 11: borrowed(b, e); break;
            case 12: widen(b, e->x); break;
            case 13: fma_mix(b, e->x); break;
            case 14: saturates = e->x[0]; break;
            case 15: to_eight_bits(b, e->x); break;
            case 16: lds_store(b, e->x); break;
            }
            pc += e->x[15];
            s[256] = (u32)pc;
            s[257] = (u32)(pc >> 32);
        }
        if (timed) e->ticks += tsc() - t0;
        e->count++;
        n++;
        if (e->flags & 1) {
            rc = 1;
            break;
        }
    }
    *done += n;
    return rc;
}
