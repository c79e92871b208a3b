// Llama's MLP, y = D (silu(G x) * (U x)), over a stream's tokens.
//
// forward, 256 tokens at a time so that what is F wide stays in L2:
//   g, u     [16 features of G and the same 16 of U] x [32 tokens] is one block; silu(g) u is formed
//            in it and stored as B of the next product
//   y        D times that, k in pieces that stay in L1
// backward, with dy the gradient of y and s = sigmoid(g):
//   dh = Dᵀ dy;   du = dh silu(g);   dg = dh u (s + silu(g) (1 - s))
//   dx = Gᵀ dg + Uᵀ du               Dᵀ, Gᵀ and Uᵀ are transposed into tiles, once a call
//   dG = dg xᵀ;   dU = du xᵀ;   dD = dy hᵀ     over all tokens at once
// What is saved for it is g and u, rounded: [2][F/16][T/32][16 features][32 tokens].
#include "common.h"
static const long kRows = 256, kPiece = 384;

// y [tokens][D] = A x B: A [D][K], row by row with `lda` and steps of 32 (rows 16 apart are `la`
// apart), or in tiles; B in panels.
INL void product_back(const bf* A, long lda, long as, long la, long D, long K,
                      const bf* B, long panels, float* c, bf* out) {
  for (long d = 0; d < D; d += 32)
    for (long k = 0; k < K; k += kPiece) {
      long steps = std::min(kPiece, K - k) / 32;
      const bf* a = A + d / 16 * la + k / 32 * as;
      for (long p = 0; p < panels; p++) {
        blk<true>(a, a + la, lda, as, B + p * K * 32 + k * 32, 1024, steps, c + p * 1024, 32, k > 0);
        if (k + kPiece >= K) store_tokens(c + p * 1024, out + p * 32 * D + d, D);
      }
    }
}

// x, y [T][D]; gate, upw [F][D]; down [D][F]; saved as above, or null
EXPORT int mlp_forward(const bf* x, const bf* gate, const bf* upw, const bf* down, bf* y, bf* saved,
                       long T, long D, long F) {
  KERNEL(
    bf* xp = s.get<bf>(kRows * D); bf* h = s.get<bf>(kRows * F);
    float* sums = s.get<float>(kRows * 32);
    alignas(64) float c[1024];
    for (long r = 0; r < T; r += kRows) {
      long n = std::min(kRows, T - r); long panels = n / 32;
      pack_features(x + r * D, D, n, D, xp);
      for (long f = 0; f < F; f += 16)
        for (long p = 0; p < panels; p++) {
          blk<true>(gate + f * D, upw + f * D, D, 32, xp + p * D * 32, 1024, D / 32, c, 32, false);
          if (saved) {
            bf* sg = saved + f / 16 * T * 16 + (r / 32 + p) * 512;
            bf* su = sg + F * T;
            for (int i = 0; i < 16; i++) {
              const float* cg = c + i * 32; const float* cu = cg + 512;
              _mm512_storeu_si512(sg + i * 32, narrow2(_mm512_load_ps(cg), _mm512_load_ps(cg + 16)));
              _mm512_storeu_si512(su + i * 32, narrow2(_mm512_load_ps(cu), _mm512_load_ps(cu + 16)));
            }
          }
          bf* hp = h + p * F * 32 + f / 32 * 1024 + f % 32 / 2 * 32;
          for (int i = 0; i < 16; i += 2)
            for (int half = 0; half < 2; half++) {
              __m512 product[2];
              for (int j = 0; j < 2; j++) {
                const float* at = c + (i + j) * 32 + 16 * half;
                __m512 g = _mm512_load_ps(at); __m512 u = _mm512_load_ps(at + 512);
                product[j] = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u);
              }
              _mm512_storeu_si512(hp + half * 512 + i / 2 * 32, paired(product[0], product[1]));
            }
        }
      product_back(down, F, 32, 16 * F, D, F, h, panels, sums, y + r * D);
    })
}

// dx [T][D], or null. Gradients of weights: null where not wanted.
EXPORT int mlp_backward(const bf* x, const bf* dy, const bf* saved, const bf* gate, const bf* upw,
                        const bf* down, bf* dx, bf* dgate, bf* dup, bf* ddown, float* dgate32,
                        float* dup32, float* ddown32, long add_gate, long add_up, long add_down,
                        long T, long D, long F) {
  KERNEL(
    Gradient to_gate{dgate, dgate32, add_gate}; Gradient to_up{dup, dup32, add_up};
    Gradient to_down{ddown, ddown32, add_down};
    bool weights = to_gate.wanted() || to_up.wanted() || to_down.wanted();
    bf* downT = s.get<bf>(F * D); bf* bothT = dx ? s.get<bf>(2 * F * D) : nullptr;
    bf* dyp = s.get<bf>(kRows * D); bf* dboth = dx ? s.get<bf>(kRows * 2 * F) : nullptr;
    float* sums = s.get<float>(kRows * 32);
    bf* A = weights ? s.get<bf>(3 * F * T) : nullptr;
    alignas(64) float c[1024];
    transposed_tiles(down, F, D, F, downT);
    if (dx) {
      transposed_tiles(gate, D, F, D, bothT, 2 * F * 16);
      transposed_tiles(upw, D, F, D, bothT + F * 16, 2 * F * 16);
    }
    const __m512 one = _mm512_set1_ps(1.f);
    for (long r = 0; r < T; r += kRows) {
      long n = std::min(kRows, T - r); long panels = n / 32;
      pack_features(dy + r * D, D, n, D, dyp);
      for (long f = 0; f < F; f += 32)
        for (long p = 0; p < panels; p++) {
          blk<true>(downT + f * D, downT + (f + 16) * D, 32, 512, dyp + p * D * 32, 1024, D / 32, c,
                    32, false);
          for (int half = 0; half < 2; half++) {
            long at = ((f / 16 + half) * T + r + p * 32) * 16;
            const bf* sg = saved + at; const bf* su = sg + F * T;
            const float* ch = c + half * 512;
            for (int i = 0; i < 16; i += 2) {
              __m512 dg[2][2]; __m512 du[2][2];
              for (int j = 0; j < 2; j++) {
                __m512 product[2];
                for (int u = 0; u < 2; u++) {
                  long of = (i + j) * 32 + 16 * u;
                  __m512 g = up(sg + of); __m512 v = up(su + of); __m512 dh = _mm512_load_ps(ch + of);
                  __m512 sig = sigmoid(g); __m512 silu = _mm512_mul_ps(g, sig);
                  product[u] = _mm512_mul_ps(silu, v);
                  du[j][u] = _mm512_mul_ps(dh, silu);
                  __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, sig), sig);
                  dg[j][u] = _mm512_mul_ps(_mm512_mul_ps(dh, v), slope);
                }
                if (weights) {
                  bf* to = A + at + (i + j) * 32;
                  _mm512_storeu_si512(to, narrow2(product[0], product[1]));
                  _mm512_storeu_si512(to + F * T, narrow2(dg[j][0], dg[j][1]));
                  _mm512_storeu_si512(to + 2 * F * T, narrow2(du[j][0], du[j][1]));
                }
              }
              if (dx) {
                bf* to = dboth + p * 2 * F * 32 + f * 32 + half * 256 + i / 2 * 32;
                for (int u = 0; u < 2; u++) {
                  _mm512_storeu_si512(to + u * 512, paired(dg[0][u], dg[1][u]));
                  _mm512_storeu_si512(to + F * 32 + u * 512, paired(du[0][u], du[1][u]));
                }
              }
            }
          }
        }
      if (dx) product_back(bothT, 32, 512, 2 * F * 16, D, 2 * F, dboth, panels, sums, dx + r * D);
    }
    if (to_gate.wanted() || to_up.wanted()) {
      bf* xt = s.get<bf>(T * D);
      pack_tokens(x, D, T, D, xt);
      if (to_gate.wanted()) weight_gradient(A + F * T, F, D, T, xt, to_gate);
      if (to_up.wanted()) weight_gradient(A + 2 * F * T, F, D, T, xt, to_up);
    }
    if (to_down.wanted()) {
      bf* dyt = s.get<bf>(T * D);
      pack_tokens(dy, D, T, D, dyt);
      weight_gradient(A, F, D, T, dyt, to_down, true);
    })
}
