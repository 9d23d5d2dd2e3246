// The noise stream: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, section 4.3), for single words and vectors of them.
//
// Key: the 64-bit seed. Counter: words 0 and 1 the block index, element / 4; words 2 and 3 the 64-bit offset. A block's words
// (w0, w1) make the normals of its elements 0 and 1, (w2, w3) those of 2 and 3.
#pragma once

#include "elbo_math.h"

namespace fused_elbo {

constexpr int LANES = 4;

// A specialisation multiplies: wide(W, uint32_t) is the 64-bit product of low words, and high() and low() give its halves as W.
// Whatever stands above a word's 32 bits is ignored.
template <class W>
struct Word;

template <class W>
struct Block {
  W w0, w1, w2, w3;
};

template <class W>
FE_FN Block<W> philox4x32(Block<W> c, uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const auto p0 = Word<W>::wide(c.w0, 0xD2511F53u), p1 = Word<W>::wide(c.w2, 0xCD9E8D57u);
    c = {Word<W>::high(p1) ^ c.w1 ^ k0, Word<W>::low(p1), Word<W>::high(p0) ^ c.w3 ^ k1, Word<W>::low(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fused_elbo
