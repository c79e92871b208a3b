// What all kernels share: blocks of 32 x 32, operands in the order that blocks read, exp, scratch.
//
// Everything is computed [features][tokens]: a product is weights (A, row by row as the model has
// them) times states (B, packed). A token is a column by itself, so its bits do not depend on how
// many other tokens are in the call, or where it stands. Sums of softmax run over rows, with tokens
// in the lanes of a vector. What comes out of a product is the next one's B by one conversion and
// one permutation.
//
//   A tile      16 rows of 32 numbers, each row 64 bytes, rows any distance apart
//   B tile      [16 pairs of k][16 columns][2]: the two numbers of a pair of k side by side
//   B panel     for 32 columns: for each 32 of k two B tiles, one behind the other (2 KB)
//
// Every function of the interface returns 0, or 1 where memory is short.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

typedef uint16_t bf;  // bfloat16, as its bits
#define INL static inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef SMOLDPO_CHECK
// For tests: each piece of memory begins as NaN and ends at a page that nobody may touch.
class Scratch {
  static constexpr size_t page = 4096;
  std::vector<std::pair<char*, size_t>> all;

 public:
  struct Mark {};
  Mark mark() const { return {}; }
  void back_to(Mark) {}
  ~Scratch() {
    for (auto& [start, size] : all) munmap(start, size);
  }
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64, size = (bytes + page - 1) / page * page;
    void* start = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect((char*)start + size, page, PROT_NONE)) throw std::bad_alloc();
    memset(start, 0xff, size);
    all.push_back({(char*)start, size + page});
    return (T*)((char*)start + size - bytes);
  }
};
#else
// Memory of one call, given out in order; a thread keeps it for its next call.
class Scratch {
  struct Block {
    char* start;
    size_t size;
  };
  struct Blocks {
    std::vector<Block> all;
    ~Blocks() {
      for (Block b : all) free(b.start);
    }
  };
  static std::vector<Block>& blocks() {
    static thread_local Blocks kept;
    return kept.all;
  }
  size_t used = 0, block = 0;

  static Block allocate(size_t bytes) {
    const size_t page = 2ul << 20;  // pages of 2 MB where the system has them
    void* start = nullptr;
    bytes = (bytes + page - 1) / page * page;
    if (posix_memalign(&start, page, bytes)) throw std::bad_alloc();
    madvise(start, bytes, MADV_HUGEPAGE);
    return {(char*)start, bytes};
  }

 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    auto& all = blocks();
    if (all.size() < 2) return;
    size_t total = 0;  // the next call of this size finds one block
    for (Block b : all) total += b.size, free(b.start);
    all.clear();
    try {
      all.push_back(allocate(total));
    } catch (const std::bad_alloc&) {
    }
  }
  // `count` of T, aligned to 64 bytes, of any content.
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) & ~size_t(63);
    auto& all = blocks();
    while (block < all.size() && used + bytes > all[block].size) block++, used = 0;
    if (block == all.size()) {
      all.reserve(all.size() + 1);
      all.push_back(allocate(bytes));
    }
    T* found = (T*)(all[block].start + used);
    used += bytes;
    return found;
  }
  // Where the next memory comes from, to give back all that is taken after it.
  struct Mark {
    size_t block, used;
  };
  Mark mark() const { return {block, used}; }
  void back_to(Mark m) { block = m.block, used = m.used; }
};
#endif

#ifdef __AMX_TILE__
struct Tiles {  // eight tiles of 16 rows of 64 bytes, while this lives
  Tiles() {
    struct __attribute__((packed)) {
      uint8_t palette = 1, start = 0, reserved[14] = {0};
      uint16_t bytes[16] = {0};
      uint8_t rows[16] = {0};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// c [32 x 32] = A (rows from a0 and from a1, 16 each, lda apart) B, or added to it (`acc`).
// The next 32 of k are `as` elements on in A and `bs` in B. Streaming loads (SA, SB) are for the
// operand that is read once: it does not push the other one out of the cache.
template <bool SB, bool SA = false>
INL void blk(const bf* a0, const bf* a1, long lda, long as, const bf* b, long bs, long steps,
             float* c, long ldc, bool acc) {
  if (acc) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < steps; k++) {
    if (SB) _tile_stream_loadd(6, b, 64); else _tile_loadd(6, b, 64);
    if (SA) _tile_stream_loadd(4, a0, lda * 2); else _tile_loadd(4, a0, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (SB) _tile_stream_loadd(7, b + 512, 64); else _tile_loadd(7, b + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (SA) _tile_stream_loadd(5, a1, lda * 2); else _tile_loadd(5, a1, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a0 += as, a1 += as, b += bs;
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}
#else
struct Tiles {
  Tiles() {}
  ~Tiles() {}
};

// The same without tiles, for AVX-512 with bfloat16: 8 rows of A at a time in 16 accumulators.
// Called, not inlined, so that compiling takes seconds.
static __attribute__((noinline)) void block(const bf* a0, const bf* a1, long lda, long as,
                                            const bf* b, long bs, long steps, float* c, long ldc,
                                            bool acc) {
  for (int part = 0; part < 4; part++) {
    const bf* a = (part < 2 ? a0 : a1) + part % 2 * 8 * lda;
    float* to = c + part * 8 * ldc;
    __m512 sum[8][2];
    for (int i = 0; i < 8; i++)
      for (int u = 0; u < 2; u++)
        sum[i][u] = acc ? _mm512_loadu_ps(to + i * ldc + 16 * u) : _mm512_setzero_ps();
    for (long k = 0; k < steps; k++)
      for (int pair = 0; pair < 16; pair++) {
        const bf* at = b + k * bs + pair * 32;
        __m512bh left = (__m512bh)_mm512_loadu_si512(at);
        __m512bh right = (__m512bh)_mm512_loadu_si512(at + 512);
        for (int i = 0; i < 8; i++) {
          int32_t both;
          memcpy(&both, a + k * as + i * lda + pair * 2, 4);
          __m512bh row = (__m512bh)_mm512_set1_epi32(both);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], row, left);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], row, right);
        }
      }
    for (int i = 0; i < 8; i++)
      for (int u = 0; u < 2; u++) _mm512_storeu_ps(to + i * ldc + 16 * u, sum[i][u]);
  }
}
template <bool SB, bool SA = false>
INL void blk(const bf* a0, const bf* a1, long lda, long as, const bf* b, long bs, long steps,
             float* c, long ldc, bool acc) {
  block(a0, a1, lda, as, b, bs, steps, c, ldc, acc);
}
#endif

INL __m512 up(const bf* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INL __m512i narrow2(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INL void narrow(bf* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

static const uint16_t kPairs[32] __attribute__((aligned(64))) = {
    0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
// Two rows of k of a result as one row of a B tile.
INL __m512i paired(__m512 even, __m512 odd) {
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), narrow2(even, odd));
}

// exp(x), relative error about 2e-7; 0 below -87.3, since denormals take a hundred times as long.
// 2^n p(r), with p as in Cephes' expf (Moshier).
INL __m512 exp512(__m512 x) {
  const __m512 lowest = _mm512_set1_ps(-87.3f), one = _mm512_set1_ps(1.f);
  __mmask16 live = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);  // a NaN stays one
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(lowest, x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, one));
  return _mm512_maskz_scalef_ps(live, p, n);
}
INL __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  __m512 d = _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  __m512 y = _mm512_rcp14_ps(d);  // with one step of Newton's: 28 bits
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(d, y, _mm512_set1_ps(2.f)));
}

// 16 x 16 words of 32 bits, in registers
INL void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Transposed blocks c [32 rows][32]: afterwards `low`[i] holds column i of c's first 16 rows of
// half u (columns 16 u ..), `high`[i] of its last 16.
INL void columns(const float* c, int u, __m512i* low, __m512i* high) {
  for (int i = 0; i < 16; i++) {
    low[i] = _mm512_loadu_si512(c + i * 32 + 16 * u);
    high[i] = _mm512_loadu_si512(c + (16 + i) * 32 + 16 * u);
  }
  transpose16(low);
  transpose16(high);
}
// c [32 features][32 tokens] to rows of tokens, `ld` apart
INL void store_tokens(const float* c, bf* out, long ld) {
  for (int u = 0; u < 2; u++) {
    __m512i a[16], b[16];
    columns(c, u, a, b);
    for (int i = 0; i < 16; i++)
      _mm512_storeu_si512(out + (16 * u + i) * ld,
                          narrow2(_mm512_castsi512_ps(a[i]), _mm512_castsi512_ps(b[i])));
  }
}

// x [T][ld] to B panels of 32 tokens with k = D: [T/32][D/32][2][16][16][2]. T, D multiples of 32.
INL void pack_features(const bf* x, long ld, long T, long D, bf* out) {
  for (long t = 0; t < T; t += 16)
    for (long d = 0; d < D; d += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(x + (t + i) * ld + d);
      transpose16(r);
      bf* to = out + t / 32 * D * 32 + d * 32 + t % 32 * 32;
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 32, r[i]);
    }
}
static const uint16_t kLow[32] __attribute__((aligned(64))) = {
    0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
// x [T][ld] to B with k = T: [D/32][T/32][2][16 pairs of tokens][16 of D][2]
INL void pack_tokens(const bf* x, long ld, long T, long D, bf* out) {
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (long t = 0; t < T; t += 2)
    for (long d = 0; d < D; d += 32) {
      __m512i a = _mm512_loadu_si512(x + t * ld + d), b = _mm512_loadu_si512(x + (t + 1) * ld + d);
      bf* to = out + d * T + t / 32 * 1024 + t % 32 / 2 * 32;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + 512, _mm512_permutex2var_epi16(a, high, b));
    }
}
// x [n][ld] transposed to A tiles with k = n: [D/16][..][16 of D][32 of n]; 16 of D are `stride` on.
INL void transposed_tiles(const bf* x, long ld, long n, long D, bf* out, long stride) {
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (long t = 0; t < n; t += 32)
    for (long f = 0; f < D; f += 32) {
      __m512i a[16], b[16];
      for (int i = 0; i < 16; i++) {
        __m512i even = _mm512_loadu_si512(x + (t + 2 * i) * ld + f);
        __m512i odd = _mm512_loadu_si512(x + (t + 2 * i + 1) * ld + f);
        a[i] = _mm512_permutex2var_epi16(even, low, odd);
        b[i] = _mm512_permutex2var_epi16(even, high, odd);
      }
      transpose16(a);
      transpose16(b);
      bf* to = out + f / 16 * stride + t / 32 * 512;
      for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(to + i * 32, a[i]);
        _mm512_storeu_si512(to + stride + i * 32, b[i]);
      }
    }
}
INL void transposed_tiles(const bf* x, long ld, long n, long D, bf* out) {
  transposed_tiles(x, ld, n, D, out, n * 16);
}

// Where a gradient of weights goes: rounded into `narrow`, or into `wide`, added to it if `add`.
struct Gradient {
  bf* narrow;
  float* wide;
  long add;
  bool wanted() const { return narrow || wide; }
};
INL void put(const Gradient& to, long at, __m512 low, __m512 high) {
  if (to.narrow) {
    _mm512_storeu_si512(to.narrow + at, narrow2(low, high));
    return;
  }
  if (to.add) {
    low = _mm512_add_ps(low, _mm512_loadu_ps(to.wide + at));
    high = _mm512_add_ps(high, _mm512_loadu_ps(to.wide + at + 16));
  }
  _mm512_storeu_ps(to.wide + at, low);
  _mm512_storeu_ps(to.wide + at + 16, high);
}
// A (tiles [F/16][T/32]) times B ([D/32][T/32] panels), k = T: [F][D], or transposed [D][F].
// Columns of B go in parts that stay in L2 while all rows of A pass by; a block's sum over all
// tokens stays in registers.
INL void weight_gradient(const bf* A, long F, long D, long T, const bf* B, const Gradient& to,
                         bool transposed = false) {
  alignas(64) float c[1024];
  const long part = std::max(32l, 600000 / T / 32 * 32);
  for (long d0 = 0; d0 < D; d0 += part)
    for (long f = 0; f < F; f += 32)
      for (long d = d0; d < std::min(D, d0 + part); d += 32) {
        if (to.wide && to.add)  // here before the block's sum is
          for (int i = 0; i < 32; i++) {
            const float* at = to.wide + (transposed ? (d + i) * F + f : (f + i) * D + d);
            _mm_prefetch((const char*)at, _MM_HINT_T0);
            _mm_prefetch((const char*)(at + 16), _MM_HINT_T0);
          }
        blk<true>(A + f * T, A + (f + 16) * T, 32, 512, B + d * T, 1024, T / 32, c, 32, false);
        if (!transposed) {
          for (int i = 0; i < 32; i++)
            put(to, (f + i) * D + d, _mm512_load_ps(c + i * 32), _mm512_load_ps(c + i * 32 + 16));
          continue;
        }
        for (int u = 0; u < 2; u++) {
          __m512i low[16], high[16];
          columns(c, u, low, high);
          for (int i = 0; i < 16; i++)
            put(to, (d + 16 * u + i) * F + f, _mm512_castsi512_ps(low[i]),
                _mm512_castsi512_ps(high[i]));
        }
      }
}

// Runs the body with tiles and scratch `s`; 1 where memory is short.
#define KERNEL(...)                \
  try {                            \
    Tiles tiles;                   \
    Scratch s;                     \
    __VA_ARGS__                    \
  } catch (const std::bad_alloc&) {\
    return 1;                      \
  }                                \
  return 0;
