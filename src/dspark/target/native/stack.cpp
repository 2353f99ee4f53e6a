// A stack of Llama-like layers for a few rows at a time: what one decoding round needs of a model.
//
// At batch 1 a round costs what reading the weights costs, if nothing else gets in the way. Each weight is
// read from memory once and meets all rows of the round while it is in a register, so that eight rows
// cost little more than one. Weights stay where the model keeps them, row-major; nothing is copied.
//
// The arithmetic of a row does not depend on the rows beside it: every sum runs in one fixed order. So one
// row and K+1 rows give the same bits, and speculative decoding gives the very tokens of plain decoding.
//
// Shapes: T rows, D hidden, H query heads, K key heads, E head dim, P positions.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif

namespace {

// ---- numbers: sixteen floats at once; the compiler maps them to whatever vectors the machine has

typedef float f16v __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint16_t bf16;

inline f16v load(const float* p) { f16v v; memcpy(&v, p, 64); return v; }
inline void store(float* p, f16v v) { memcpy(p, &v, 64); }
inline f16v load(const bf16* p) {
    typedef uint16_t u16x16 __attribute__((vector_size(32)));
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    u16x16 half; memcpy(&half, p, 32);
    u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
    f16v v; memcpy(&v, &wide, 64); return v;
}
inline bf16 to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u; memcpy(&u, &x, 4);
    if (x != x) return uint16_t((u >> 16) | 64);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Floats to another precision.
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = to_bf16(x); }
inline void put(float* p, f16v v) { store(p, v); }
inline void put(bf16* p, f16v v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, 32);
#else
    for (int i = 0; i < 16; i++) p[i] = to_bf16(v[i]);
#endif
}

// One rounding, said explicitly: left to itself the compiler fuses `a + b * c` in some copies of a loop only.
inline f16v multiply_add(f16v b, f16v c, f16v a) {
#if defined(__AVX512F__)
    return (f16v)_mm512_fmadd_ps((__m512)b, (__m512)c, (__m512)a);
#else
    for (int i = 0; i < 16; i++) a[i] = std::fma(b[i], c[i], a[i]);
    return a;
#endif
}

inline float sum(f16v v) {  // a fixed tree, the one of `sums`
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = v[i] + v[i + width];
    return v[0];
}

inline f16v exp16(f16v x) {  // 2^n * polynomial, relative error below 2e-7 over floats that do not overflow
    x = x < -87.0f ? f16v{} - 87.0f : x;
    x = x > 88.0f ? f16v{} + 88.0f : x;
    f16v n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    i16v bits; memcpy(&bits, &n, 64);
    n -= 12582912.0f;
    f16v r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f16v p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16v scale = (bits + 127) << 23;  // the low bits of `n` before subtraction are the whole number
    f16v s; memcpy(&s, &scale, 64);
    return p * s;
}

// How far ahead of the weights in use others are asked for, and into which cache (the second level): measured on
// Zen 4 with 1 to 16 rows; into the first level it costs half as much again at six rows. A tile that takes weight
// rows side by side meets the last row's first line early, so it must be a whole block ahead.
constexpr int DISTANCE = 16384, LOCALITY = 2;
inline int64_t ahead_of(int64_t block_bytes) { return block_bytes + 4096 > DISTANCE ? block_bytes + 4096 : DISTANCE; }

// ---- one weight row times one activation row, STEP products at a time

#if defined(__AVX512BF16__)
struct Bf16Dot {
    typedef bf16 W; typedef bf16 X; typedef __m512 Acc;
    static constexpr int STEP = 32;
    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc step(Acc a, __m512i w, __m512i x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); }
    static __m512i get(const bf16* p) { return _mm512_loadu_si512(p); }
    static __m512i get(const bf16* p, int count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
};
#else
struct Bf16Dot {
    typedef bf16 W; typedef bf16 X; typedef f16v Acc;
    static constexpr int STEP = 16;
    static Acc zero() { return f16v{}; }
    static Acc step(Acc a, f16v w, f16v x) { return multiply_add(w, x, a); }
    static f16v get(const bf16* p) { return load(p); }
    static f16v get(const bf16* p, int count) { bf16 b[16] = {}; memcpy(b, p, 2 * count); return load(b); }
};
#endif
struct F32Dot {
    typedef float W; typedef float X; typedef f16v Acc;
    static constexpr int STEP = 16;
    static Acc zero() { return f16v{}; }
    static Acc step(Acc a, f16v w, f16v x) { return multiply_add(w, x, a); }
    static f16v get(const float* p) { return load(p); }
    static f16v get(const float* p, int count) { float b[16] = {}; memcpy(b, p, 4 * count); return load(b); }
};

// 8-bit weights with one scale an output, 16-bit activations with one scale a row, whole-number sums. A row keeps
// as many levels as cannot overflow 32 bits: 29,000 at 576 products, 1,100 at 14,336.
struct I8Dot {
    typedef int8_t W; typedef int16_t X;
#if defined(__AVX512BW__)
    typedef __m512i Acc;
    static constexpr int STEP = 32;
    static Acc zero() { return _mm512_setzero_si512(); }
    static __m512i get(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
    static __m512i get(const int16_t* p) { return _mm512_loadu_si512(p); }
    static Acc step(Acc a, __m512i w, __m512i x) {
#if defined(__AVX512VNNI__)
        return _mm512_dpwssd_epi32(a, w, x);
#else
        return _mm512_add_epi32(a, _mm512_madd_epi16(w, x));
#endif
    }
#else
    typedef i16v Acc;
    static constexpr int STEP = 16;
    static Acc zero() { return i16v{}; }
    template <class N> static i16v get(const N* p) { i16v v; for (int i = 0; i < 16; i++) v[i] = p[i]; return v; }
    static Acc step(Acc a, i16v w, i16v x) { return a + w * x; }
#endif
    template <class N> static auto get(const N* p, int count) { N b[STEP] = {}; memcpy(b, p, sizeof(N) * count); return get(b); }
};

// A row of activations as a dot product takes it; returns the scale that its results are to be multiplied with.
template <class X> inline float convert(const float* x, int n, X* out) {
    for (int i = 0; i < n; i += 16) put(out + i, load(x + i));
    return 1.0f;
}
inline float convert(const float* x, int n, int16_t* out) {
    f16v most{}, broken{};
    for (int i = 0; i < n; i += 16) {
        const f16v v = load(x + i), size = v < 0.0f ? -v : v;
        most = size > most ? size : most;
        broken = v == v ? broken : v;  // a NaN would otherwise become some number
    }
    float largest = 0.0f;
    for (int i = 0; i < 16; i++) {
        largest = most[i] > largest ? most[i] : largest;
        if (broken[i] != broken[i]) return broken[i];
    }
    if (largest == 0.0f) { memset(out, 0, 2 * n); return 0.0f; }
    const float levels = std::fmin(32767.0f, std::floor(2147483647.0f / 128.0f / float(n)));
    const float step = levels / largest;
    for (int i = 0; i < n; i += 16) {
        const f16v rounded = (load(x + i) * step + 12582912.0f) - 12582912.0f;
        typedef int16_t s16x16 __attribute__((vector_size(32)));
        const s16x16 whole = __builtin_convertvector(rounded, s16x16);
        memcpy(out + i, &whole, 32);
    }
    return largest / levels;
}

// Sixteen accumulators to sixteen sums, each lane in the order of `sum`.
#if defined(__AVX512F__)
// Four rounds of adding halves of two accumulators that share a register; `add` knows what the lanes hold.
template <class Add> inline __m512 folded(__m512 (&a)[16], Add add) {
    for (int i = 0; i < 8; i++) a[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
    for (int i = 0; i < 4; i++) a[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++) a[i] = add(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xee));
    const __m512 sum = add(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xdd));
    // Lane 4q + j now holds accumulator q' + j', q' of (0, 8, 4, 12) and j' of (0, 2, 1, 3).
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), sum);
}
inline f16v sums(const __m512i (&acc)[16]) {  // whole numbers
    __m512 a[16];
    memcpy(a, acc, sizeof a);
    const __m512 whole = folded(a, [](__m512 x, __m512 y) {
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
    });
    return (f16v)_mm512_cvtepi32_ps(_mm512_castps_si512(whole));
}
template <class Acc> inline f16v sums(const Acc (&acc)[16]) {  // floats, under either of their two names
    __m512 a[16];
    memcpy(a, acc, sizeof a);
    return (f16v)folded(a, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}
#else
inline f16v sums(const f16v (&acc)[16]) {
    f16v out;
    for (int i = 0; i < 16; i++) out[i] = sum(acc[i]);
    return out;
}
inline f16v sums(const i16v (&acc)[16]) {
    f16v out;
    for (int i = 0; i < 16; i++) {
        int32_t total = 0;
        for (int j = 0; j < 16; j++) total += acc[i][j];
        out[i] = float(total);
    }
    return out;
}
#endif

// Sixteen outputs of up to MR rows (`count` of them real), NR weight rows side by side.
//
// With one row and NR = 1 the weights are one stream in the order they lie in memory, which the processor fetches
// ahead by itself. Not so with more rows: there (AHEAD) the lines to come are asked for.
template <class Dot, int MR, int NR, bool AHEAD>
inline void tile(const typename Dot::W* w, const typename Dot::X* x, int K, int ldx, int count, f16v* y) {
    constexpr int G = 16 / MR;  // outputs whose sums are made together
    const typename Dot::X* rows[MR];
    for (int m = 0; m < MR; m++) rows[m] = x + int64_t(m < count ? m : 0) * ldx;
    alignas(64) float out[MR * 16];
    for (int n0 = 0; n0 < 16; n0 += G) {
        typename Dot::Acc group[16];
#pragma GCC unroll 16
        for (int i = MR * G; i < 16; i++) group[i] = Dot::zero();
        for (int g = 0; g < G; g += NR, w += int64_t(NR) * K) {
            typename Dot::Acc acc[MR * NR];
#pragma GCC unroll 16
            for (auto& a : acc) a = Dot::zero();
            const char* ahead = (const char*)w + ahead_of(int64_t(NR) * K * sizeof(*w));
            int k = 0;
            for (; k + Dot::STEP <= K; k += Dot::STEP) {
                decltype(Dot::get(w)) ws[NR];
#pragma GCC unroll 16
                for (int n = 0; n < NR; n++, ahead += Dot::STEP * sizeof(*w)) {
                    ws[n] = Dot::get(w + int64_t(n) * K + k);
                    if (AHEAD) __builtin_prefetch(ahead, 0, LOCALITY);
                }
#pragma GCC unroll 16
                for (int m = 0; m < MR; m++) {
                    const auto xs = Dot::get(rows[m] + k);
#pragma GCC unroll 16
                    for (int n = 0; n < NR; n++) acc[m * NR + n] = Dot::step(acc[m * NR + n], ws[n], xs);
                }
            }
            if (k < K)
#pragma GCC unroll 16
                for (int n = 0; n < NR; n++)
#pragma GCC unroll 16
                    for (int m = 0; m < MR; m++)
                        acc[m * NR + n] = Dot::step(acc[m * NR + n], Dot::get(w + int64_t(n) * K + k, K - k), Dot::get(rows[m] + k, K - k));
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
                for (int n = 0; n < NR; n++) group[m * G + g + n] = acc[m * NR + n];
        }
        alignas(64) float sixteen[16];
        store(sixteen, sums(group));
        for (int m = 0; m < MR; m++) memcpy(out + m * 16 + n0, sixteen + m * G, G * sizeof(float));
    }
    for (int m = 0; m < count; m++) y[m] = load(out + m * 16);
}

// Sixteen outputs of T rows: y[t] = x[t] . w[n..n+15]. A row's sums run in one order in all of these.
template <class Dot>
inline void sixteen_outputs(const typename Dot::W* w, const typename Dot::X* x, int K, int ldx, int T, f16v* y) {
    if (T == 1) return tile<Dot, 1, 1, false>(w, x, K, ldx, 1, y);
    if (T == 2) return tile<Dot, 2, 1, true>(w, x, K, ldx, 2, y);
    if (T <= 4) return tile<Dot, 4, 1, true>(w, x, K, ldx, T, y);
    if (T <= 6) return tile<Dot, 6, 2, true>(w, x, K, ldx, T, y);
    tile<Dot, 8, 2, true>(w, x, K, ldx, T < 8 ? T : 8, y);
    for (int t = 8; t < T; t += 8)  // the weights are in the cache now
        tile<Dot, 8, 2, false>(w, x + int64_t(t) * ldx, K, ldx, T - t < 8 ? T - t : 8, y + t);
}

#if TILES
// The processor's matrix unit (Intel's AMX): a tile of sixteen weight rows meets sixteen activation rows at once, which takes
// less time than reading the weights does. A row's sums run in one order in all of these as well.

// The kernel grants the use of tiles once for the process; without, and for other precisions, `tile` does the work.
inline bool tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// While it lives, this thread's tiles are 16 rows of 64 bytes each.
struct TileConfig {
    struct alignas(64) Layout { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t row_bytes[16] = {}; uint8_t rows[16] = {}; };
    const bool on;
    explicit TileConfig(bool use) : on(use) {
        if (!on) return;
        Layout layout;
        for (int i = 0; i < 8; i++) layout.row_bytes[i] = 64, layout.rows[i] = 16;
        asm volatile("" : : "r"(&layout) : "memory");  // gcc 12 tells its optimiser that only eight bytes are read
        _tile_loadconfig(&layout);
    }
    ~TileConfig() { if (on) _tile_release(); }
};

// How activations lie in tiles: [T / 16][n / STEP] tiles, one after the other for each of PARTS, of [lane][row][numbers of a lane].
template <class X> struct TileLayout { static constexpr int STEP = 1, PARTS = 0; };
template <> struct TileLayout<bf16> {
    static constexpr int STEP = 32, PARTS = 1;
    static void put(const bf16* x, int n, char* to, int) {
        for (int i = 0; i < n; i += 2, to += 64) memcpy(to, x + i, 4);
    }
};
template <> struct TileLayout<int16_t> {  // x = 256 * high + low: a tile of each, high with a sign
    static constexpr int STEP = 64, PARTS = 2;
    static void put(const int16_t* x, int n, char* to, int part) {
        for (int i = 0; i < n; i += 4, to += i % 64 ? 64 : 64 + 1024)
            for (int j = 0; j < 4; j++) to[j] = char(part ? x[i + j] & 255 : x[i + j] >> 8);
    }
};

// What is left of sixteen weight rows after the last whole step, and zeros.
template <class W> struct Rest {
    static constexpr int STEP = 64 / sizeof(W);
    alignas(64) W numbers[16 * STEP] = {};
    Rest(const W* w, int K) {
        const int whole = K / STEP * STEP;
        if (whole < K)
            for (int n = 0; n < 16; n++) memcpy(numbers + n * STEP, w + int64_t(n) * K + whole, sizeof(W) * (K - whole));
    }
};

// Sixteen outputs of NB blocks of sixteen rows: out[block][output][row].
template <int NB> inline void tile_products(const bf16* w, int K, const char* x, float* out) {
    const int whole = K / 32, steps = (K + 31) / 32;
    const Rest<bf16> rest(w, K);
    const char* ahead = (const char*)(w + int64_t(16) * K);
    const int64_t block = int64_t(steps) * 1024;
    _tile_zero(0);
    if (NB > 1) _tile_zero(1);
    if (NB > 2) _tile_zero(2);
    if (NB > 3) _tile_zero(3);
    for (int k = 0; k < steps; k++, x += 1024) {
        if (k < whole) _tile_loadd(4, w + k * 32, 2 * K);
        else _tile_loadd(4, rest.numbers, 64);
        for (int line = 0; line < 16; line++, ahead += 64) __builtin_prefetch(ahead, 0, LOCALITY);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (NB > 1) { _tile_loadd(6, x + block, 64); _tile_dpbf16ps(1, 4, 6); }
        if (NB > 2) { _tile_loadd(7, x + 2 * block, 64); _tile_dpbf16ps(2, 4, 7); }
        if (NB > 3) { _tile_loadd(5, x + 3 * block, 64); _tile_dpbf16ps(3, 4, 5); }
    }
    _tile_stored(0, out, 64);
    if (NB > 1) _tile_stored(1, out + 256, 64);
    if (NB > 2) _tile_stored(2, out + 512, 64);
    if (NB > 3) _tile_stored(3, out + 768, 64);
}

// The same of 8-bit weights: whole numbers, of the high parts in out[block][0], of the low ones in out[block][1].
template <int NB> inline void tile_products(const int8_t* w, int K, const char* x, int32_t* out) {
    const int whole = K / 64, steps = (K + 63) / 64;
    const Rest<int8_t> rest(w, K);
    const char* ahead = (const char*)(w + int64_t(16) * K);
    const int64_t block = int64_t(steps) * 2048;
    _tile_zero(0);
    _tile_zero(1);
    if (NB > 1) { _tile_zero(2); _tile_zero(3); }
    for (int k = 0; k < steps; k++, x += 2048) {
        if (k < whole) _tile_loadd(4, w + k * 64, K);
        else _tile_loadd(4, rest.numbers, 64);
        for (int line = 0; line < 16; line++, ahead += 64) __builtin_prefetch(ahead, 0, LOCALITY);
        _tile_loadd(5, x, 64);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, x + 1024, 64);
        _tile_dpbsud(1, 4, 6);
        if (NB > 1) {
            _tile_loadd(5, x + block, 64);
            _tile_dpbssd(2, 4, 5);
            _tile_loadd(7, x + block + 1024, 64);
            _tile_dpbsud(3, 4, 7);
        }
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    if (NB > 1) { _tile_stored(2, out + 512, 64); _tile_stored(3, out + 768, 64); }
}

// Column `row` of a tile of sixteen outputs.
template <class Number> inline __m512i column(const Number* tile, int row) {
    const __m512i outputs = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(16));
    return _mm512_i32gather_epi32(outputs, (const int*)tile + row, 4);
}

// y[t - first] = x[t] . w[n..n+15] for the rows `first` to T.
inline void tiled_outputs(const bf16* w, const char* x, int K, int first, int T, f16v* y) {
    const int64_t block = int64_t((K + 31) / 32) * 1024;
    for (int b = first / 16, last = (T + 15) / 16; b < last; b += 4) {
        alignas(64) float out[4 * 256];
        switch (std::min(last - b, 4)) {
            case 1: tile_products<1>(w, K, x + b * block, out); break;
            case 2: tile_products<2>(w, K, x + b * block, out); break;
            case 3: tile_products<3>(w, K, x + b * block, out); break;
            default: tile_products<4>(w, K, x + b * block, out);
        }
        for (int t = std::max(first, 16 * b); t < std::min(T, 16 * b + 64); t++)
            y[t - first] = (f16v)_mm512_castsi512_ps(column(out + (t / 16 - b) * 256, t % 16));
    }
}
inline void tiled_outputs(const int8_t* w, const char* x, int K, int first, int T, f16v* y) {
    const int64_t block = int64_t((K + 63) / 64) * 2048;
    for (int b = first / 16, last = (T + 15) / 16; b < last; b += 2) {
        alignas(64) int32_t out[4 * 256];
        if (last - b == 1) tile_products<1>(w, K, x + b * block, out);
        else tile_products<2>(w, K, x + b * block, out);
        for (int t = std::max(first, 16 * b); t < std::min(T, 16 * b + 32); t++) {
            const int32_t* tiles = out + (t / 16 - b) * 512;
            const __m512i high = _mm512_slli_epi32(column(tiles, t % 16), 8);  // may overflow; the sum of both does not
            y[t - first] = (f16v)_mm512_cvtepi32_ps(_mm512_add_epi32(high, column(tiles + 256, t % 16)));
        }
    }
}
#else
inline bool tiles_allowed() { return false; }
struct TileConfig { explicit TileConfig(bool) {} };
template <class X> struct TileLayout { static constexpr int STEP = 1, PARTS = 0; };
#endif

// Sixteen lanes of keys or values, N numbers side by side in each, times N numbers that all lanes share.
struct F32Lanes {
    typedef float Number;
    static constexpr int N = 1;
    static f16v step(f16v acc, const float* lanes, const float* shared) { return multiply_add(load(lanes), f16v{} + *shared, acc); }
};
struct Bf16Lanes {
    typedef bf16 Number;
    static constexpr int N = 2;
    static f16v step(f16v acc, const bf16* lanes, const bf16* shared) {
        i16v pairs; memcpy(&pairs, lanes, 64);
        int32_t pair; memcpy(&pair, shared, 4);
#if defined(__AVX512BF16__)
        return (f16v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)pairs, (__m512bh)_mm512_set1_epi32(pair));
#else
        const i16v first = pairs << 16, second = pairs & int32_t(0xffff0000);
        const int32_t one = int32_t(uint32_t(pair) << 16), two = pair & int32_t(0xffff0000);
        f16v a, b; memcpy(&a, &first, 64); memcpy(&b, &second, 64);
        float x, y; memcpy(&x, &one, 4); memcpy(&y, &two, 4);
        return multiply_add(b, f16v{} + y, multiply_add(a, f16v{} + x, acc));
#endif
    }
};

inline void rms_norm(const float* x, const float* weight, float eps, int D, float* out) {
    f16v squares{};
    for (int i = 0; i < D; i += 16) squares = multiply_add(load(x + i), load(x + i), squares);
    const float scale = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
    for (int i = 0; i < D; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
}

// Rotates one head's E numbers in place; table holds E/2 cosines, then E/2 sines, of the row's position.
inline void rotate(float* x, const float* table, int E) {
    const int half = E / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half], c = table[i], s = table[half + i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

}  // namespace

// ---- what the caller fills in; stack.py mirrors these structures

extern "C" {

struct Linear { const void* weight; const float *bias, *scale; int32_t num_out, num_in; };  // scale: of 8-bit weights, an output
enum Kind { F32, BF16, INT8 };  // of the weights; keys and values are bfloat16 beside 8-bit weights
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null for families without
    Linear q, k, v, o, gate, up, down;
};
// How a head that drafts a token a pass joins its rows of x with embeddings e: as [norm(e); norm(x)], which `fc` makes the residual
// stream of (MTP), or where there is none the first layer's attention reads beside x as it is (EAGLE-3).
struct Joint { const float *embedded_norm, *state_norm; Linear fc; };
struct Stack {
    int32_t num_layers, hidden, heads, kv_heads, head_dim, inner, kind;
    float eps, rope_scale;
    const float* inverse_frequencies;  // E/2
    const Layer* layers;
    const float* final_norm;
    Linear output;
    Joint joint;
};
// The keys and values of one request lie in pages of 32 positions: [layer][key or value][kv head], then 32 * E numbers, laid
// out so that sixteen lanes can be read at once (N numbers a lane: 2 of 16 bits, 1 of 32): keys [position / 16][E / N][16][N],
// values [position / N][E][N]. What no token has filled is finite. A page starts at a line.
// Rows of one request, after `past` cached ones; they see positions from `first` on, the first of a page.
struct Segment { void* const* pages; int32_t num_rows, past, first; };
struct Segments { const Segment* all; int32_t count; };
struct Pass {
    Segments segments;  // their rows one after the other are the T rows of the pass
    int32_t causal, num_logits, num_taps, threads;
    const int32_t* tap_layers;
    float* x;        // [T, D] residual stream, in and out
    const float* embedded;  // [T, D] to be joined with x before the first layer; null: x is not joined with anything
    float* taps;     // [T, M, D]
    float* logits;   // [num_logits, V]
    float* normed;   // [num_logits, D] the states behind the logits
    int32_t* best;   // [num_logits] where the largest logit is, the first of equals; -1 where none is or one is no number
};
// What a drafted token is drawn by. Temperature 0: it is the best of its row. Else from the softmax at this temperature of what
// top-k (0: all), top-p and min-p leave, in this order: the one whose slice of the cumulative law holds a uniform number, or, where there
// are races, the one whose probability divided by its race's number is largest.
struct Sampling {
    float temperature, top_p, min_p;
    int32_t top_k;
    const double* uniforms;      // [G] in [0, 1)
    const float* const* races;   // [G] of [V], by target id; or null, all or single ones
};
// Drafts of R requests, G tokens each, through a sequential head whose bias is W2 W1[previous token] (paper eq. 5).
struct Chain {
    Linear w2;                // [Vd, r]
    const void* w1;           // [V, r], in the precision of the stack's weights
    const int64_t* draft_ids; // [Vd] target ids
    const float* confidence;  // [D + r + 1] weights and bias of the confidence head (paper eq. 7); null for none
    const float* const* hidden;  // [R] of [G, D]
    const int64_t* anchors;   // [R] the token before each draft
    const Sampling* sampling; // [R]
    float* const* logits;     // [R] of [G, Vd] base logits; the bias is added, and where a token is drawn its row becomes its law
    int32_t* choices;         // [R, G] which draft tokens, -1 as in `best` above, then also for all after it
    float *confidences;       // [R, G] logits
    float *margins;           // [R, G] the largest logit less the second
    int32_t num_requests, num_tokens, threads;
};
// The rest of one request's draft by a head that drafts a token a pass: each slot joins the state of the one before with the token
// that was chosen there.
struct Follow {
    Segment rest;             // a row a token, after the slots that are cached
    const void* embeddings;   // [V, D], in the precision of the stack's weights
    const int64_t* draft_ids; // [Vd] target ids
    const Sampling* sampling;
    float* x;                 // [D] the last slot's state, in and out
    float* logits;            // [G, Vd]; where a token is drawn its row becomes its law
    int32_t* choices;         // [G] which draft tokens, -1 as in `best` above, then also for all after it
    int64_t token;            // the first one that is joined
    int32_t threads;
};

// What stands of a draft of K tokens, and the token after it: core/verifier.py's block verification.
struct Judging {
    const float* target;       // [K + 1, V] the target's laws
    const int64_t* ids;        // [K, C] the tokens that the draft chose from, and their chances; rows a distance apart
    const float* chances;
    const int64_t* tokens;     // [K]
    const double* uniforms;    // [K], and one for the next token
    int64_t ids_distance, chances_distance, next;  // next: out, the token after what stands
    int32_t num_tokens, num_choices, vocabulary;
};

}  // extern "C"

namespace {

struct Range { int first, last; };
inline Range share(int count) {  // this thread's part of `count` equal pieces
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    return {int(int64_t(count) * me / threads), int(int64_t(count) * (me + 1) / threads)};
}

// All threads of a region meet here, some 150 times a pass. Waiting is spinning: OpenMP's own barrier may put
// a thread to sleep, which costs more than the work between two barriers.
class Barrier {
    std::atomic<int> waiting{0}, round{0};

  public:
    void meet() {
        const int now = round.load(std::memory_order_acquire);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            waiting.store(0, std::memory_order_relaxed);
            round.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 10000) std::this_thread::yield();  // more threads than cores, or another program is on ours
    }
};

// Memory that begins with a cache line: a vector that lies across two takes more than one load.
template <class Number> struct Aligned {
    struct alignas(64) Line { Number numbers[64 / sizeof(Number)]; };
    std::vector<Line> lines;
    explicit Aligned(size_t count = 0) : lines((count * sizeof(Number) + 63) / 64) {}
    void resize(size_t count) { lines.resize((count * sizeof(Number) + 63) / 64); }
    Number& operator[](size_t i) { return lines.data()->numbers[i]; }
    Number* data() { return lines.data()->numbers; }
};

// Rows as a dot product takes them, [T, n] and a distance apart, each with the scale of its results; or where the matrix unit is
// used, in tiles. A thread converts for itself.
template <class X> struct Rows {
    typedef TileLayout<X> Layout;
    const bool tiled;
    int n, distance, steps;
    Aligned<X> numbers;
    Aligned<char> tiles;
    std::vector<float> scales;
    Rows(int T, int size)
        : tiled(Layout::PARTS && tiles_allowed()), n(size), distance((size + 31) / 32 * 32), steps((size + Layout::STEP - 1) / Layout::STEP),
          numbers(size_t(tiled ? 1 : T) * distance), tiles(tiled ? size_t((T + 15) / 16) * steps * Layout::PARTS * 1024 : 0), scales(T) {}
    X* row(int t) { return numbers.data() + size_t(tiled ? 0 : t) * distance; }
    void take(int t, const float* x) {
        scales[t] = convert(x, n, row(t));
        if constexpr (Layout::PARTS > 0) {
            char* to = tiles.data() + size_t(t / 16) * steps * Layout::PARTS * 1024 + t % 16 * 4;
            for (int part = 0; tiled && part < Layout::PARTS; part++) Layout::put(row(t), n, to + part * 1024, part);
        }
    }
    void take_all(Aligned<float>& x) {
        for (size_t t = 0; t < scales.size(); t++) take(int(t), &x[t * n]);
    }
};

// The largest of many numbers that come sixteen at a time, and where it was: the first of equals; and the second largest.
struct Largest {
    f16v value = f16v{} - INFINITY, second = value;
    i16v index{}, broken{};
    void see(f16v x, int n) {
        const i16v lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const i16v better = x > value;
        const f16v less = better ? value : x;
        second = less > second ? less : second;
        value = better ? x : value;
        index = better ? lanes + n : index;
        broken |= x != x;
    }
    // Of all of `parts`; -1 if no number is finite, the largest is infinite, or one is NaN.
    static int32_t of(const Largest* parts, int count, int distance) {
        float most = -INFINITY;
        int32_t where = -1;
        for (int p = 0; p < count; p++)
            for (int i = 0; i < 16; i++) {
                const Largest& part = parts[int64_t(p) * distance];
                if (part.broken[i]) return -1;
                if (part.value[i] > most || (part.value[i] == most && part.index[i] < where)) most = part.value[i], where = part.index[i];
            }
        return most == INFINITY ? -1 : where;
    }
    // The largest of all less the second.
    static float margin(const Largest* parts, int count, int distance) {
        float most = -INFINITY, next = -INFINITY;
        for (int p = 0; p < count; p++)
            for (int i = 0; i < 16; i++)
                for (const float x : {parts[int64_t(p) * distance].value[i], parts[int64_t(p) * distance].second[i]}) {
                    next = std::max(next, std::min(x, most));
                    most = std::max(most, x);
                }
        return most - next;
    }
};

// Makes laws of rows of logits and draws from them. One thread has a whole row, so the bits do not depend on how many threads there are.
class Drawing {
    std::vector<float> sorted;
    std::vector<double> up_to;  // the law's sum up to the end of each sixteen

    static double sum_of(f16v v) {
        typedef float f8v __attribute__((vector_size(32)));
        typedef double d8v __attribute__((vector_size(64)));
        f8v low, high; memcpy(&low, &v, 32); memcpy(&high, (const char*)&v + 32, 32);
        d8v sum = __builtin_convertvector(low, d8v) + __builtin_convertvector(high, d8v);
        for (int width = 4; width; width /= 2)
            for (int i = 0; i < width; i++) sum[i] = sum[i] + sum[i + width];
        return sum[0];
    }

    // The least weight that stays, where the largest is 1.
    float least_kept(const float* weights, int n, const Sampling& how) {
        float least = 0.0f;
        if (how.top_k > 0 && how.top_k < n) {
            sorted.assign(weights, weights + n);
            std::nth_element(sorted.begin(), sorted.begin() + how.top_k - 1, sorted.end(), std::greater<float>());
            least = sorted[how.top_k - 1];
        }
        if (how.top_p < 1.0f) {
            double total = 0.0, left = 0.0;
            for (int i = 0; i < n; i++) total += weights[i] >= least ? weights[i] : 0.0f;
            const double leave = (1.0 - how.top_p) * total;
            const float small = std::max(least, float(leave / n));  // what is below goes, all of it together is less than may go
            sorted.clear();
            for (int i = 0; i < n; i++) {
                if (weights[i] >= small) sorted.push_back(weights[i]);
                else if (weights[i] >= least) left += weights[i];
            }
            std::sort(sorted.begin(), sorted.end());
            least = 1.0f;
            for (const float weight : sorted)
                if ((left += weight) > leave) { least = weight; break; }
        }
        return std::max(least, how.min_p);
    }

    int raced(const float* law, const float* race, int n, const int64_t* ids) const {
        int winner = 0;
        float most = -1.0f;
        for (int i = 0; i < n; i++)
            if (law[i] > 0.0f && law[i] / race[ids[i]] > most) most = law[i] / race[ids[i]], winner = i;
        return winner;
    }

    // Where `uniform` lies in the cumulative law; never at a probability of 0.
    int at(const float* law, double uniform, int n) const {
        const double place = uniform * up_to.back();
        const int block = int(std::upper_bound(up_to.begin(), up_to.end() - 1, place) - up_to.begin());
        double sum = block ? up_to[block - 1] : 0.0;
        int last = -1;
        for (int i = 16 * block; i < 16 * block + 16; i++)
            if (law[i] > 0.0f) {
                last = i;
                if ((sum += law[i]) > place) break;
            }
        while (last < 0 || law[last] <= 0.0f) last = last > 0 ? last - 1 : n - 1;  // rounding led past the last one
        return last;
    }

  public:
    // A token of a law, or of numbers in proportion to one.
    int draw(const float* law, int n, double uniform) {
        up_to.resize(n / 16);
        double sum = 0.0;
        for (int i = 0; i < n; i += 16) up_to[i / 16] = sum += sum_of(load(law + i));
        return at(law, uniform, n);
    }

    // The token of step k from a row of n logits whose largest is `most`; the row becomes the law it is drawn from.
    int draw(float* row, int n, float most, const Sampling& how, int k, const int64_t* ids) {
        for (int i = 0; i < n; i += 16) {
            const f16v below = (load(row + i) - most) / (f16v{} + how.temperature), weight = exp16(below);
            store(row + i, below < -80.0f ? f16v{} : weight);
        }
        const float least = least_kept(row, n, how);
        double total = 0.0, sum = 0.0;
        for (int i = 0; i < n; i += 16) {
            const f16v weight = load(row + i), kept = weight < least ? f16v{} : weight;
            store(row + i, kept);
            total += sum_of(kept);
        }
        up_to.resize(n / 16);
        for (int i = 0; i < n; i += 16) {
            const f16v law = load(row + i) * float(1.0 / total);
            store(row + i, law);
            up_to[i / 16] = sum += sum_of(law);
        }
        const float* race = how.races ? how.races[k] : nullptr;
        return race ? raced(row, race, n, ids) : at(row, how.uniforms[k], n);
    }
};

// The verifier of one draft. Names and order of steps are those of core/verifier.py: verify.
class Verifier {
    Judging& j;
    std::vector<double> standing{1.0};  // after each part of the block, from none of it on
    Aligned<float> left;
    Drawing drawing;

    const float* law(int k) const { return j.target + int64_t(k) * j.vocabulary; }

    float drafted_with(int k, int64_t token) const {
        const int64_t* ids = j.ids + k * j.ids_distance;
        const int64_t* found = std::find(ids, ids + j.num_choices, token);
        return found == ids + j.num_choices ? 0.0f : j.chances[k * j.chances_distance + (found - ids)];
    }

    // What the next token still needs of each word's chance once tokens of this draft have brought theirs; their sum.
    double left_over(int k) {
        const float* p = law(k);
        const float s = float(standing[k]);
        for (int i = 0; i < j.vocabulary; i += 16) store(&left[i], load(p + i) * s);
        for (int c = 0; c < j.num_choices; c++) {
            float& rest = left[j.ids[k * j.ids_distance + c]];
            rest = std::max(rest - j.chances[k * j.chances_distance + c], 0.0f);
        }
        double total = 0.0;
        for (int i = 0; i < j.vocabulary; i += 256) {  // all in double would take longer than the rest of this
            f16v low{};
            for (int n = i; n < std::min(i + 256, j.vocabulary); n += 16) low += load(&left[n]);
            total += sum(low);
        }
        return total;
    }

    double chance_of_end(int k) {
        if (k == j.num_tokens || standing[k] == 1.0) return standing[k];
        const double rest = left_over(k);
        return rest / (rest + 1.0 - standing[k]);
    }

  public:
    explicit Verifier(Judging& judging) : j(judging), left(judging.vocabulary) {}

    int judge() {
        for (int k = 0; k < j.num_tokens; k++) {
            const double chance = std::min(1.0, double(law(k)[j.tokens[k]] / drafted_with(k, j.tokens[k])) * standing[k]);
            if (chance == 0.0) break;
            standing.push_back(chance);
        }
        int k = int(standing.size()) - 1;
        while (k > 0 && j.uniforms[k - 1] >= chance_of_end(k)) k--;
        const bool anew = k < j.num_tokens && left_over(k) > 0.0;
        j.next = drawing.draw(anew ? left.data() : law(k), j.vocabulary, j.uniforms[j.num_tokens]);
        return k;
    }
};

// `Dot` multiplies weights, `Lanes` keys and values.
template <class Dot, class Lanes> struct Runner {
    typedef typename Dot::X X;
    typedef typename Lanes::Number KV;
    static constexpr int N = Lanes::N;
    struct Row { int segment; int64_t position; };
    const Stack& s;
    const Segments& segments;
    std::vector<Row> rows;
    const int T;
    std::vector<float> angles;

    Runner(const Stack& stack, const Segments& parts) : s(stack), segments(parts), rows(rows_of(parts)), T(int(rows.size())), angles(T * s.head_dim) {
        const int half = s.head_dim / 2;
        for (int t = 0; t < T; t++)
            for (int i = 0; i < half; i++) {
                const float angle = float(rows[t].position) * s.inverse_frequencies[i];
                angles[t * s.head_dim + i] = std::cos(angle) * s.rope_scale;
                angles[t * s.head_dim + half + i] = std::sin(angle) * s.rope_scale;
            }
    }

    static std::vector<Row> rows_of(const Segments& segments) {
        std::vector<Row> rows;
        for (int i = 0; i < segments.count; i++)
            for (int t = 0; t < segments.all[i].num_rows; t++) rows.push_back({i, int64_t(segments.all[i].past) + t});
        return rows;
    }

    // Keys or values of one head: those of positions 32 i to 32 i + 31 begin at [i].
    struct Column {
        void* const* pages;
        int64_t offset;
        Column from(int position) const { return {pages + position / 32, offset}; }
        KV* operator[](int64_t i) const { return (KV*)pages[i] + offset; }
    };
    Column cached(const Segment& segment, int layer, int value, int head) const {
        return {segment.pages, ((int64_t(layer) * 2 + value) * s.kv_heads + head) * 32 * s.head_dim};
    }

    // Outputs n..n+15 of all rows from `first` on.
    void outputs(const Linear& linear, int n, Rows<X>& x, f16v* y, int first = 0) const {
        const int K = linear.num_in, rows = T - first;
        const auto* w = (const typename Dot::W*)linear.weight + int64_t(n) * K;
        if constexpr (TileLayout<X>::PARTS > 0) {
            if (x.tiled) tiled_outputs(w, x.tiles.data(), K, first, T, y);
            else sixteen_outputs<Dot>(w, x.row(first), K, x.distance, rows, y);
        } else
            sixteen_outputs<Dot>(w, x.row(first), K, x.distance, rows, y);
        if (linear.scale)
            for (int t = 0; t < rows; t++) y[t] *= x.scales[first + t] * load(linear.scale + n);
        if (linear.bias)
            for (int t = 0; t < rows; t++) y[t] += load(linear.bias + n);
    }

    // Ask for the first weights of a slice while its inputs are still being made: the stream in `tile` starts cold.
    void warm(const Linear& linear, int n) const {
        const auto* w = (const typename Dot::W*)linear.weight + int64_t(n) * linear.num_in;
        for (int i = 0; i < 16 * linear.num_in; i += 64 / sizeof(*w)) __builtin_prefetch(w + i, 0, LOCALITY);
    }

    // One head of a query, key or value projection for all rows, [T, E]; queries and keys are normed and rotated.
    void project_head(const Linear& linear, int head, Rows<X>& x, f16v* y, float* out, const float* norm, bool turn) const {
        const int E = s.head_dim;
        for (int e = 0; e < E; e += 16) {
            outputs(linear, head * E + e, x, y);
            for (int t = 0; t < T; t++) store(out + t * E + e, y[t]);
        }
        for (int t = 0; turn && t < T; t++) {
            if (norm) rms_norm(out + t * E, norm, s.eps, E, out + t * E);
            rotate(out + t * E, &angles[t * E], E);
        }
    }

    // Keys and values of one layer; `unit` counts key heads, then value heads.
    void key_or_value(int layer, int unit, Rows<X>& x, f16v* y, float* head_TE) const {
        const Layer& l = s.layers[layer];
        const bool value = unit >= s.kv_heads;
        const int head = unit - value * s.kv_heads, E = s.head_dim;
        project_head(value ? l.v : l.k, head, x, y, head_TE, l.k_norm, !value);
        for (int t = 0; t < T; t++) {
            KV* to = cached(segments.all[rows[t].segment], layer, value, head)[rows[t].position / 32];
            const int position = rows[t].position % 32;
            for (int e = 0; e < E; e++)
                put(to + (value ? (position / N * E + e) * N + position % N
                                : (position / 16 * (E / N) + e / N) * 16 * N + position % 16 * N + e % N),
                    head_TE[t * E + e]);
        }
    }

    // Dot products of up to MR queries with all keys, sixteen keys to a block, several blocks at once.
    template <int MR> void score(Column keys, const KV* const* q, int count, int num_blocks, float* const* scores) const {
        constexpr int NB = 8 / MR;
        const int E = s.head_dim;
        for (int block = 0; block < num_blocks; block += NB) {
            const KV* k[NB];
            for (int b = 0; b < NB; b++) {
                const int here = block + b < num_blocks ? block + b : block;
                k[b] = keys[here / 2] + here % 2 * 16 * E;
            }
            f16v acc[MR][NB]{};
            for (int e = 0; e < E; e += N)
#pragma GCC unroll 8
                for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
                    for (int b = 0; b < NB; b++) acc[m][b] = Lanes::step(acc[m][b], k[b] + e * 16, q[m] + e);
            for (int m = 0; m < count; m++)
                for (int b = 0; b < NB && block + b < num_blocks; b++) store(scores[m] + (block + b) * 16, acc[m][b]);
        }
    }

    // Scores of `padded` positions, times `scale`, become weights that are not yet divided by their sum, which is returned.
    static float soften(float* scores, float scale, int seen, int padded, KV* weights) {
        for (int j = 0; j < seen; j += 16) store(scores + j, load(scores + j) * scale);
        for (int j = seen; j < padded; j++) scores[j] = -INFINITY;
        f16v largest = load(scores);
        for (int j = 16; j < padded; j += 16) {
            const f16v score = load(scores + j);
            largest = score > largest ? score : largest;
        }
        float most = largest[0];
        for (int i = 1; i < 16; i++) most = largest[i] > most ? largest[i] : most;
        f16v total{};
        for (int j = 0; j < padded; j += 16) {
            const f16v score = load(scores + j);
            f16v weight = exp16(score - most);
            weight = score == -INFINITY ? f16v{} : weight;
            total += weight;
            put(weights + j, weight);
        }
        return sum(total);
    }

    // Sums of the first `seen` values by the weights of up to MR rows: BE blocks of sixteen outputs from number e on.
    template <int MR, int BE> void mix(Column values, const KV* const* weights, int count, int seen, int e, const float* share, float* const* out) const {
        const int E = s.head_dim;
        f16v acc[MR][BE]{};
        for (int begin = 0; begin < seen; begin += 32) {
            const KV* page = values[begin / 32] + e * N;
            const int end = std::min(32, seen - begin);
            for (int j = 0; j < end; j += N)
#pragma GCC unroll 4
                for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
                    for (int b = 0; b < BE; b++) acc[m][b] = Lanes::step(acc[m][b], page + j * E + 16 * b * N, weights[m] + begin + j);
        }
        for (int m = 0; m < count; m++)
            for (int b = 0; b < BE; b++) store(out[m] + e + 16 * b, acc[m][b] * share[m]);
    }
    template <int MR> void mix(Column values, const KV* const* weights, int count, int seen, const float* share, float* const* out) const {
        int e = 0;
        for (; e + 64 <= s.head_dim; e += 64) mix<MR, 4>(values, weights, count, seen, e, share, out);
        for (; e < s.head_dim; e += 16) mix<MR, 1>(values, weights, count, seen, e, share, out);
    }

#if TILES
    // Sixteen rows of queries at most, in tiles: keys and values lie as the matrix unit wants them.
    void attend_tiled(Column keys, Column values, const KV* const* q, int count, const int* seen, int padded, float* const* to, float* scores, KV* weights) const {
        const int E = s.head_dim;
        alignas(64) KV rows[4][512] = {};  // [E / 32][row][32]
        for (int m = 0; m < count; m++)
            for (int e = 0; e < E; e += 32) memcpy(&rows[e / 32][m * 32], q[m] + e, 64);
        _tile_loadd(4, rows[0], 64);
        if (E > 32) _tile_loadd(5, rows[1], 64);
        if (E > 64) _tile_loadd(6, rows[2], 64);
        if (E > 96) _tile_loadd(7, rows[3], 64);
        for (int j = 0; j < padded; j += 16) {
            const KV* k = keys[j / 32] + j % 32 * E;
            _tile_zero(0);
            _tile_loadd(1, k, 64);
            _tile_dpbf16ps(0, 4, 1);
            if (E > 32) { _tile_loadd(2, k + 512, 64); _tile_dpbf16ps(0, 5, 2); }
            if (E > 64) { _tile_loadd(3, k + 1024, 64); _tile_dpbf16ps(0, 6, 3); }
            if (E > 96) { _tile_loadd(1, k + 1536, 64); _tile_dpbf16ps(0, 7, 1); }
            _tile_stored(0, scores + j, 4 * padded);
        }
        int most = 0;
        float share[16];
        for (int m = 0; m < count; m++) {
            share[m] = 1.0f / soften(scores + int64_t(m) * padded, 1.0f / std::sqrt(float(E)), seen[m], padded, weights + int64_t(m) * padded);
            most = std::max(most, seen[m]);
        }
        alignas(64) float sums[2][256];
        for (int e = 0; e < E; e += 32) {
            _tile_zero(0);
            _tile_zero(1);
            for (int j = 0; j < most; j += 32) {
                const KV* v = values[j / 32] + 2 * e;
                _tile_loadd(4, weights + j, 2 * padded);
                _tile_loadd(5, v, 4 * E);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, v + 32, 4 * E);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            for (int m = 0; m < count; m++)
                for (int half = 0; half < 2; half++) store(to[m] + e + 16 * half, load(sums[half] + 16 * m) * share[m]);
        }
    }
#endif

    // Rows that attention takes at once; with tiles where the sizes allow.
    bool tiles_fit() const { return TileLayout<X>::PARTS > 0 && tiles_allowed() && s.head_dim % 32 == 0 && s.head_dim <= 128; }

    struct Scratch {  // of one thread's attention
        Aligned<float> scores;
        Aligned<KV> weights;
    };

    // Up to eight rows (with tiles sixteen) of the queries of one key head over a request's cache; `unit` counts the request's query heads, its R
    // rows each, of which the pass has the first as row `base`. A row sees the segment's positions up to its own, or all of
    // the request's. Its arithmetic is the same whatever rows are beside it.
    void attend(int layer, const Segment& segment, int base, int unit, int count, bool causal, const KV* q, float* out, Scratch& scratch) const {
        const int E = s.head_dim, HE = s.heads * E, R = segment.num_rows, kv = unit / R / (s.heads / s.kv_heads);
        const int past = segment.past - segment.first, total = past + R, padded = (total + 31) / 32 * 32;
        scratch.scores.resize(size_t(16) * padded);
        scratch.weights.resize(size_t(16) * padded);
        const KV *queries[16], *weights[16];
        float *scores[16], *to[16], share[16];
        int seen[16], most = 0;
        for (int m = 0; m < 16; m++) {  // rows past `count` repeat the first and are not stored
            const int row = unit + (m < count ? m : 0), head = row / R, t = row % R;
            queries[m] = q + int64_t(base + t) * HE + head * E;
            to[m] = out + int64_t(base + t) * HE + head * E;
            scores[m] = &scratch.scores[size_t(m) * padded];
            weights[m] = &scratch.weights[size_t(m < count ? m : 0) * padded];
            seen[m] = causal ? past + t + 1 : total;
        }
        const Column keys = cached(segment, layer, 0, kv).from(segment.first), values = cached(segment, layer, 1, kv).from(segment.first);
#if TILES
        if constexpr (TileLayout<X>::PARTS > 0)
            if (tiles_fit()) return attend_tiled(keys, values, queries, count, seen, padded, to, scratch.scores.data(), scratch.weights.data());
#endif
        if (count == 1) score<1>(keys, queries, count, padded / 16, scores);
        else if (count == 2) score<2>(keys, queries, count, padded / 16, scores);
        else if (count <= 4) score<4>(keys, queries, count, padded / 16, scores);
        else score<8>(keys, queries, count, padded / 16, scores);
        for (int m = 0; m < count; m++) {
            share[m] = 1.0f / soften(scores[m], 1.0f / std::sqrt(float(E)), seen[m], padded, (KV*)weights[m]);
            most = seen[m] > most ? seen[m] : most;
        }
        if (count == 1) return mix<1>(values, weights, count, most, share, to);
        if (count == 2) return mix<2>(values, weights, count, most, share, to);
        for (int m = 0; m < count; m += 4) mix<4>(values, weights + m, count - m < 4 ? count - m : 4, most, share + m, to + m);
    }

    // This thread's part of a layer's attention: an equal part of all keys that are to be read.
    void attend_to_all(int layer, bool causal, const KV* q, float* out, Scratch& scratch) const {
        const int threads = omp_get_num_threads(), me = omp_get_thread_num();
        auto cost = [&](const Segment& segment) { return int64_t(segment.past - segment.first + segment.num_rows + 32); };  // of one unit
        const int at_once = tiles_fit() ? 16 : 8;
        int64_t total = 0, before = 0;
        for (int i = 0; i < segments.count; i++) total += cost(segments.all[i]) * segments.all[i].num_rows * s.heads;
        const int64_t first = total * me / threads, last = total * (me + 1) / threads;
        for (int i = 0, base = 0; i < segments.count; base += segments.all[i++].num_rows) {
            const Segment& segment = segments.all[i];
            const int units = s.heads * segment.num_rows, group = units / s.kv_heads;  // units of one group share keys and values
            auto unit_at = [&](int64_t place) { return int(std::clamp<int64_t>((place - before) / cost(segment), 0, units)); };
            const int end = unit_at(last);
            for (int unit = unit_at(first), count; unit < end; unit += count) {
                count = std::min({at_once, end - unit, (unit / group + 1) * group - unit});
                attend(layer, segment, base, unit, count, causal, q, out, scratch);
            }
            before += cost(segment) * units;
        }
    }

    void forward(const Pass& p) {
        const int D = s.hidden, E = s.head_dim, HE = s.heads * E, V = s.output.num_out;
        Aligned<KV> q(size_t(T) * HE);
        Aligned<float> attended(size_t(T) * HE), inner(size_t(T) * s.inner);
        std::vector<Largest> largest(p.best ? size_t(p.threads) * p.num_logits : 0);
        Barrier barrier;
#pragma omp parallel num_threads(p.threads)
        {
            Rows<X> normed(T, D), attention_rows(T, HE), inner_rows(T, s.inner), joined(p.embedded ? T : 0, 2 * D);
            const TileConfig tiles(normed.tiled);
            Aligned<float> one_row(2 * D), head_TE(size_t(T) * E);
            Scratch scratch;
            std::vector<f16v> ys(2 * T);
            f16v *y = ys.data(), *z = y + T;
            auto norm_rows = [&](const float* weight) {  // by every thread for itself: cheaper than a barrier
                for (int t = 0; t < T; t++) {
                    rms_norm(p.x + int64_t(t) * D, weight, s.eps, D, one_row.data());
                    normed.take(t, one_row.data());
                }
            };
            auto add_to_stream = [&](const Linear& linear, Rows<X>& x, float* tap) {
                const Range mine = share(D / 16);
                for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                    outputs(linear, n, x, y);
                    for (int t = 0; t < T; t++) {
                        const f16v sum = load(p.x + int64_t(t) * D + n) + y[t];
                        store(p.x + int64_t(t) * D + n, sum);
                        if (tap) store(tap + int64_t(t) * p.num_taps * D + n, sum);
                    }
                }
            };
            for (int t = 0; p.embedded && t < T; t++) {
                rms_norm(p.embedded + int64_t(t) * D, s.joint.embedded_norm, s.eps, D, one_row.data());
                rms_norm(p.x + int64_t(t) * D, s.joint.state_norm, s.eps, D, one_row.data() + D);
                joined.take(t, one_row.data());
            }
            if (p.embedded && s.joint.fc.weight) {
                barrier.meet();  // all have read x
                const Range mine = share(D / 16);
                for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                    outputs(s.joint.fc, n, joined, y);
                    for (int t = 0; t < T; t++) store(p.x + int64_t(t) * D + n, y[t]);
                }
                barrier.meet();
            }
            for (int layer = 0; layer < s.num_layers; layer++) {
                const Layer& l = s.layers[layer];
                const bool reads_joined = layer == 0 && p.embedded && !s.joint.fc.weight;
                if (!reads_joined) norm_rows(l.input_norm);
                Rows<X>& seen = reads_joined ? joined : normed;
                const Range heads = share(s.heads + 2 * s.kv_heads);
                for (int unit = heads.first; unit < heads.last; unit++) {
                    if (unit >= s.heads) {
                        key_or_value(layer, unit - s.heads, seen, y, head_TE.data());
                        continue;
                    }
                    project_head(l.q, unit, seen, y, head_TE.data(), l.q_norm, true);
                    for (int t = 0; t < T; t++)
                        for (int e = 0; e < E; e += 16) put(&q[size_t(t) * HE + unit * E + e], load(&head_TE[t * E + e]));
                }
                warm(l.o, share(D / 16).first * 16);
                barrier.meet();
                attend_to_all(layer, p.causal, q.data(), attended.data(), scratch);
                barrier.meet();
                attention_rows.take_all(attended);
                add_to_stream(l.o, attention_rows, nullptr);
                const Range units = share(s.inner / 16);
                warm(l.gate, units.first * 16);
                warm(l.up, units.first * 16);
                barrier.meet();
                norm_rows(l.post_norm);
                for (int n = units.first * 16; n < units.last * 16; n += 16) {
                    outputs(l.gate, n, normed, y);
                    outputs(l.up, n, normed, z);
                    for (int t = 0; t < T; t++) store(&inner[size_t(t) * s.inner + n], y[t] / (1.0f + exp16(-y[t])) * z[t]);
                }
                warm(l.down, share(D / 16).first * 16);
                barrier.meet();
                float* tap = nullptr;
                for (int m = 0; m < p.num_taps; m++)
                    if (p.tap_layers[m] == layer) tap = p.taps + int64_t(m) * D;
                inner_rows.take_all(inner);
                add_to_stream(l.down, inner_rows, tap);
                if (layer + 1 < s.num_layers && heads.first < s.heads) warm(s.layers[layer + 1].q, heads.first * E);
                barrier.meet();
            }
            if (p.num_logits) {
                const int first = T - p.num_logits;
                norm_rows(s.final_norm);
                if (omp_get_thread_num() == 0)
                    for (int t = 0; t < p.num_logits; t++) rms_norm(p.x + int64_t(first + t) * D, s.final_norm, s.eps, D, p.normed + int64_t(t) * D);
                const Range mine = share(V / 16);
                Largest* top = p.best ? &largest[size_t(omp_get_thread_num()) * p.num_logits] : nullptr;
                for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                    outputs(s.output, n, normed, y, first);
                    for (int t = 0; t < p.num_logits; t++) {
                        store(p.logits + int64_t(t) * V + n, y[t]);
                        if (top) top[t].see(y[t], n);
                    }
                }
            }
        }
        for (int t = 0; p.best && t < p.num_logits; t++) p.best[t] = Largest::of(&largest[t], p.threads, p.num_logits);
    }

    // A head's context (paper eq. 2): keys and values of every layer from the target's features [T, M * D].
    void context(const Linear& fc, const float* norm, const float* features, int threads) {
        const int D = s.hidden;
        Aligned<float> mixed(size_t(T) * D);
        Barrier barrier;
#pragma omp parallel num_threads(threads)
        {
            Rows<X> input(T, fc.num_in), normed(T, D);
            const TileConfig tiles(normed.tiled);
            Aligned<float> one_row(D), head_TE(size_t(T) * s.head_dim);
            std::vector<f16v> y(T);
            for (int t = 0; t < T; t++) input.take(t, features + int64_t(t) * fc.num_in);
            const Range mine = share(D / 16);
            for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                outputs(fc, n, input, y.data());
                for (int t = 0; t < T; t++) store(&mixed[size_t(t) * D + n], y[t]);
            }
            barrier.meet();
            for (int t = 0; t < T; t++) {
                rms_norm(&mixed[size_t(t) * D], norm, s.eps, D, one_row.data());
                normed.take(t, one_row.data());
            }
            const int per_layer = 2 * s.kv_heads;
            const Range units = share(s.num_layers * per_layer);
            for (int unit = units.first; unit < units.last; unit++)
                key_or_value(unit / per_layer, unit % per_layer, normed, y.data(), head_TE.data());
        }
    }

    // Adds a sequential head's bias, W2 z (paper eq. 4), to rows of logits, one of each request; and where each largest sum is,
    // or -1.
    void bias(const Linear& w2, const float* z, float* const* logits, int32_t* best, int threads) {
        std::vector<Largest> largest(size_t(threads) * T);
#pragma omp parallel num_threads(threads)
        {
            Rows<X> x(T, w2.num_in);
            const TileConfig tiles(x.tiled);
            std::vector<f16v> y(T);
            Largest* top = &largest[size_t(omp_get_thread_num()) * T];
            for (int t = 0; t < T; t++) x.take(t, z + int64_t(t) * w2.num_in);
            const Range mine = share(w2.num_out / 16);
            for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                outputs(w2, n, x, y.data());
                for (int t = 0; t < T; t++) {
                    const f16v sum = y[t] + load(logits[t] + n);
                    store(logits[t] + n, sum);
                    top[t].see(sum, n);
                }
            }
        }
        for (int t = 0; t < T; t++) best[t] = Largest::of(&largest[t], threads, T);
    }

    // Each token by its row under the bias of the one before: `bias` over and over, with no word to the caller in between.
    void chain(const Chain& c) {
        const int R = c.num_requests, G = c.num_tokens, Vd = c.w2.num_out, r = c.w2.num_in, D = s.hidden;
        std::vector<Largest> largest(size_t(2) * c.threads * R);  // of this step and the one before, which others may still read
        const bool draws = std::any_of(c.sampling, c.sampling + R, [](const Sampling& how) { return how.temperature > 0.0f; });
        Barrier barrier;
#pragma omp parallel num_threads(c.threads)
        {
            Rows<X> x(R, r);
            const TileConfig tiles(x.tiled);
            std::vector<f16v> y(R);
            std::vector<int64_t> last(c.anchors, c.anchors + R);
            std::vector<int32_t> choices(R, 0);
            Drawing drawing;
            Aligned<float> z(r);
            for (int k = 0; k < G; k++) {
                Largest* all = &largest[size_t(k % 2) * c.threads * R];
                Largest* mine_of = all + size_t(omp_get_thread_num()) * R;
                for (int t = 0; t < R; t++) {
                    mine_of[t] = Largest{};
                    const auto* row = (const typename Dot::W*)c.w1 + last[t] * r;
                    if constexpr (!std::is_same_v<typename Dot::W, int8_t>)  // heads have no 8-bit weights
                        for (int i = 0; i < r; i += 16) store(z.data() + i, load(row + i));
                    x.take(t, z.data());
                    if (c.confidence && omp_get_thread_num() == 0)
                        c.confidences[t * G + k] = dot(c.confidence, c.hidden[t] + int64_t(k) * D, D) + dot(c.confidence + D, z.data(), r)
                            + c.confidence[D + r];
                }
                const Range mine = share(Vd / 16);
                for (int n = mine.first * 16; n < mine.last * 16; n += 16) {
                    outputs(c.w2, n, x, y.data());
                    for (int t = 0; t < R; t++) {
                        float* row = c.logits[t] + int64_t(k) * Vd + n;
                        const f16v sum = y[t] + load(row);
                        store(row, sum);
                        mine_of[t].see(sum, n);
                    }
                }
                barrier.meet();
                const int me = omp_get_thread_num(), threads = omp_get_num_threads();
                for (int t = 0; t < R; t++) {
                    if (choices[t] >= 0) choices[t] = Largest::of(all + t, c.threads, R);
                    if (t % threads != me) continue;
                    float* row = c.logits[t] + int64_t(k) * Vd;
                    const bool drawn = c.sampling[t].temperature > 0.0f && choices[t] >= 0;
                    c.choices[t * G + k] = drawn ? drawing.draw(row, Vd, row[choices[t]], c.sampling[t], k, c.draft_ids) : choices[t];
                    c.margins[t * G + k] = Largest::margin(all + t, c.threads, R);
                }
                if (draws) barrier.meet();
                for (int t = 0; t < R; t++) {
                    if (draws) choices[t] = c.choices[t * G + k];
                    if (choices[t] >= 0) last[t] = c.draft_ids[choices[t]];
                }
            }
        }
    }

    // One request's tokens, a pass each.
    static void follow(const Stack& s, const Follow& f) {
        const int D = s.hidden, Vd = s.output.num_out;
        Aligned<float> embedded(D), normed(D);
        Drawing drawing;
        int64_t token = f.token;
        for (int k = 0, choice = 0; k < f.rest.num_rows; k++) {
            if (choice >= 0) {
                if constexpr (!std::is_same_v<typename Dot::W, int8_t>)  // heads have no 8-bit weights
                    for (int i = 0; i < D; i += 16) store(&embedded[i], load((const typename Dot::W*)f.embeddings + token * D + i));
                float* row = f.logits + int64_t(k) * Vd;
                const Segment slot{f.rest.pages, 1, f.rest.past + k, 0};
                const Pass pass{{&slot, 1}, 1, 1, 0, f.threads, nullptr, f.x, embedded.data(), nullptr, row, normed.data(), &choice};
                Runner(s, pass.segments).forward(pass);
                if (choice >= 0 && f.sampling->temperature > 0.0f) choice = drawing.draw(row, Vd, row[choice], *f.sampling, k, f.draft_ids);
                if (choice >= 0) token = f.draft_ids[choice];
            }
            f.choices[k] = choice;
        }
    }

    static float dot(const float* a, const float* b, int n) {
        f16v total{};
        for (int i = 0; i < n; i += 16) total = multiply_add(load(a + i), load(b + i), total);
        return sum(total);
    }
};

// Calls `run` with the runner of this stack's kind.
template <class Run> void with_runner(const Stack& stack, const Segments& segments, Run run) {
    if (stack.kind == INT8) { Runner<I8Dot, Bf16Lanes> r(stack, segments); run(r); }
    else if (stack.kind == BF16) { Runner<Bf16Dot, Bf16Lanes> r(stack, segments); run(r); }
    else { Runner<F32Dot, F32Lanes> r(stack, segments); run(r); }
}

}  // namespace

extern "C" {

// Rows of requests after their cached ones; writes their keys and values, taps, and the last rows' logits.
void stack_forward(const Stack* stack, const Pass* pass) {
    with_runner(*stack, pass->segments, [&](auto& runner) { runner.forward(*pass); });
}

void stack_context(const Stack* stack, const Segments* segments, const Linear* fc, const float* norm, const float* features, int threads) {
    with_runner(*stack, *segments, [&](auto& runner) { runner.context(*fc, norm, features, threads); });
}

void stack_bias(const Stack* stack, const Linear* w2, int num_rows, const float* z, float* const* logits, int32_t* best, int threads) {
    const Segment rows{nullptr, num_rows, 0, 0};
    with_runner(*stack, Segments{&rows, 1}, [&](auto& runner) { runner.bias(*w2, z, logits, best, threads); });
}

void stack_follow(const Stack* stack, const Follow* follow) {
    with_runner(*stack, Segments{&follow->rest, 1}, [&](auto& runner) { runner.follow(*stack, *follow); });
}

int32_t stack_judge(Judging* judging) { return Verifier(*judging).judge(); }

void stack_chain(const Stack* stack, const Chain* chain) {
    const Segment rows{nullptr, chain->num_requests, 0, 0};
    with_runner(*stack, Segments{&rows, 1}, [&](auto& runner) { runner.chain(*chain); });
}

}  // extern "C"
