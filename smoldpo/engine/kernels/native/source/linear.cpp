// A linear layer, y = W x, over a stream's tokens: 256 at a time, packed once, W as the model has it.
// backward: dx = Wᵀ dy, with Wᵀ in tiles; dW = dy xᵀ over all tokens at once.
#include "common.h"
static const long kRows = 256;

INL void product(Scratch& s, const bf* x, const bf* w, long ldw, long as, long lw, bf* y, long T,
                 long D, long F) {
  bf* xp = s.get<bf>(kRows * D);
  alignas(64) float c[1024];
  for (long r = 0; r < T; r += kRows) {
    long n = std::min(kRows, T - r);
    pack_features(x + r * D, D, n, D, xp);
    for (long f = 0; f < F; f += 32)
      for (long p = 0; p < n / 32; p++) {
        const bf* a = w + f / 16 * lw;
        blk<true>(a, a + lw, ldw, as, xp + p * D * 32, 1024, D / 32, c, 32, false);
        store_tokens(c, y + (r + p * 32) * F + f, F);
      }
  }
}

// x [T][D], w [F][D], y [T][F]
EXPORT int linear_forward(const bf* x, const bf* w, bf* y, long T, long D, long F) {
  KERNEL(product(s, x, w, D, 32, 16 * D, y, T, D, F);)
}

// dx [T][D] and the gradient of w: null where not wanted
EXPORT int linear_backward(const bf* x, const bf* dy, const bf* w, bf* dx, bf* dw, float* dw32,
                           long add, long T, long D, long F) {
  KERNEL(
    if (dx) {
      bf* wT = s.get<bf>(F * D);
      transposed_tiles(w, D, F, D, wT);
      product(s, dy, wT, 32, 512, 16 * F, dx, T, F, D);
    }
    Gradient to{dw, dw32, add};
    if (to.wanted()) {
      bf* A = s.get<bf>(T * F); bf* B = s.get<bf>(T * D);
      transposed_tiles(dy, F, T, F, A);
      pack_tokens(x, D, T, D, B);
      weight_gradient(A, F, D, T, B, to);
    })
}

// `count` blocks of 32 x 32 over 8,192 of k, always the same 2 KB of operands: the rate that products
// would have without memory.
EXPORT int block_loop(long count) {
  KERNEL(
    bf* a = s.get<bf>(1024); bf* b = s.get<bf>(1024); float* c = s.get<float>(1024);
    memset(a, 0, 2048);
    memset(b, 0, 2048);
    for (long i = 0; i < count; i++) blk<false>(a, a + 512, 32, 0, b, 0, 256, c, 32, false);)
}
