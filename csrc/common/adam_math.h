// The arithmetic of Adam, in one place, on contiguous runs of entries.
//
// Adam: Kingma and Ba 2015, Alg. 1; AdamW: Loshchilov and Hutter 2019, Alg. 2. The operations, their order and their
// roundings are those of torch.optim.Adam(foreach=False, fused=False) on a CPU, hence the explicit fma: its lerp is
// fma(w, g - m, m), its addcmul fma(c g, g, v), while addcdiv rounds product, quotient and sum one by one. Compiler
// flags keep everything else from being fused.
#pragma once

#include <cmath>
#include <limits>

#include "common/adam_item.h"

namespace gradsel {

// Scalars of one step of one tensor, computed in double and rounded once to the type of the state.
template <class T>
struct AdamScalars {
  T sign;          // of the gradient: -1 to maximise
  T decay;         // L2 term added to the gradient
  T shrink;        // decoupled decay: the parameter is multiplied by it; 1 without
  T lerp;          // 1 - beta1, or -beta1 from 1/2 up, where torch starts from the other end
  bool lerp_small;
  T beta2, one_minus_beta2;
  T root_of_correction, eps, minus_step_size;
  bool pulls, pull_l1, pull_decoupled;  // whether there is an anchor, and of which kind
  T pull;        // factor of the gap, or for L1 of its sign, in the gradient (coupled) or the step (decoupled)
  T grad_scale;  // gradients are divided by it before anything else; 1 without a scaler
};

// The corrections are 1 - beta1^t and 1 - beta2^t.
template <class T>
GRADSEL_INLINE AdamScalars<T> scalars(const AdamHyperparameters& h, double correction1, double correction2) {
  const bool decays = h.weight_decay != 0;
  const double pull = h.anchor_l1 ? h.anchor : 2 * h.anchor;
  AdamScalars<T> s;
  s.sign = h.maximize ? T(-1) : T(1);
  s.decay = decays && !h.decoupled_weight_decay ? static_cast<T>(h.weight_decay) : T(0);
  s.shrink = decays && h.decoupled_weight_decay ? static_cast<T>(1 - h.lr * h.weight_decay) : T(1);
  const T lerp = static_cast<T>(1 - h.beta1);
  s.lerp_small = std::abs(lerp) < T(0.5);
  s.lerp = s.lerp_small ? lerp : lerp - 1;
  s.beta2 = static_cast<T>(h.beta2);
  s.one_minus_beta2 = static_cast<T>(1 - h.beta2);
  s.root_of_correction = static_cast<T>(std::sqrt(correction2));
  s.eps = static_cast<T>(h.eps);
  s.minus_step_size = static_cast<T>(-(h.lr / correction1));
  s.pulls = h.anchor != 0;
  s.pull_l1 = h.anchor_l1;
  s.pull_decoupled = h.anchor_decoupled;
  s.pull = static_cast<T>(h.anchor_decoupled ? h.lr * pull : pull);
  s.grad_scale = static_cast<T>(h.grad_scale);
  return s;
}

GRADSEL_INLINE float fused(float a, float b, float c) { return std::fma(a, b, c); }
GRADSEL_INLINE double fused(double a, double b, double c) { return std::fma(a, b, c); }

// One entry. The flags are constants in the loops below, so that the CPU can vectorise them. GPUs branch: there the
// flags are the same for a whole tensor.

template <class T>
GRADSEL_INLINE void decay_entry(T& p, T& g, const AdamScalars<T>& s, bool decays) {
  p *= s.shrink;
  g *= s.sign;
  if (decays) g = fused(p, s.decay, g);
}

// What comes before Adam where there is an anchor (GRFT, Alg. 1 line 8): the gradient's sign and weight decay as usual,
// then the pull towards the original value.
template <class T>
GRADSEL_INLINE void pull_entry(T& p, T& g, T original, const AdamScalars<T>& s, bool decays, bool l1, bool decoupled) {
  decay_entry(p, g, s, decays);
  const T gap = p - original;
  const T along = l1 ? T(gap > 0) - T(gap < 0) : gap;  // the sign of NaN is 0, as in torch.sign
  if (decoupled) {
    const T moved = fused(along, -s.pull, p);
    p = l1 && std::abs(gap) <= s.pull ? original : moved;
  } else {
    g = fused(along, s.pull, g);
  }
}

// The scalars for the Adam step that follows: sign and decay have been applied.
template <class T>
GRADSEL_INLINE AdamScalars<T> after_pull(const AdamScalars<T>& s) {
  AdamScalars<T> rest = s;
  rest.sign = rest.shrink = 1;
  rest.decay = 0;
  return rest;
}

template <class T>
GRADSEL_INLINE void adam_entry(T& p, T g, T& m, T& v, T& v_max, const AdamScalars<T>& s, bool decays, bool amsgrad) {
  decay_entry(p, g, s, decays);
  m = fused(s.lerp, g - m, s.lerp_small ? m : g);
  v = fused(s.one_minus_beta2 * g, g, v * s.beta2);
  T second_moment = v;
  if (amsgrad) {
    v_max = v_max != v_max || v_max > v ? v_max : v;  // a NaN on either side stays
    second_moment = v_max;
  }
  const T denominator = std::sqrt(second_moment) / s.root_of_correction + s.eps;
  p = p + s.minus_step_size * m / denominator;
}

// A separate pass, over a block that is in the cache, keeps adam_loop simple. The new gradient goes to `pulled`, which
// may be `grad`.
template <class T, bool decays, bool l1, bool decoupled>
GRADSEL_INLINE void pull_loop(T* GRADSEL_RESTRICT param, const T* grad, T* pulled,
                              const T* GRADSEL_RESTRICT original, int64_t count, const AdamScalars<T>& scalars) {
  const AdamScalars<T> s = scalars;
  for (int64_t i = 0; i < count; ++i) {
    T p = param[i], g = grad[i];
    pull_entry(p, g, original[i], s, decays, l1, decoupled);
    param[i] = p;
    pulled[i] = g;
  }
}

// As in torch's fused Adam; a separate pass for the same reason. `scaled` may be `grad`.
template <class T>
GRADSEL_INLINE void unscale_loop(const T* grad, T* scaled, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) scaled[i] = grad[i] / scale;
}

template <class T, bool decays>
GRADSEL_INLINE void pull(T* param, const T* grad, T* pulled, const T* original, int64_t count,
                         const AdamScalars<T>& s) {
  if (s.pull_l1 && s.pull_decoupled)
    pull_loop<T, decays, true, true>(param, grad, pulled, original, count, s);
  else if (s.pull_l1)
    pull_loop<T, decays, true, false>(param, grad, pulled, original, count, s);
  else if (s.pull_decoupled)
    pull_loop<T, decays, false, true>(param, grad, pulled, original, count, s);
  else
    pull_loop<T, decays, false, false>(param, grad, pulled, original, count, s);
}

// Returns the scalars for the adam_math() that follows.
template <class T>
GRADSEL_INLINE AdamScalars<T> anchor_math(T* param, const T* grad, T* pulled, const T* original, int64_t count,
                                          const AdamScalars<T>& s) {
  if (s.decay != 0)
    pull<T, true>(param, grad, pulled, original, count, s);
  else
    pull<T, false>(param, grad, pulled, original, count, s);
  return after_pull(s);
}

template <class T, bool decays, bool amsgrad>
GRADSEL_INLINE void adam_loop(T* GRADSEL_RESTRICT param, const T* GRADSEL_RESTRICT grad, T* GRADSEL_RESTRICT exp_avg,
                              T* GRADSEL_RESTRICT exp_avg_sq, T* GRADSEL_RESTRICT max_exp_avg_sq, int64_t count,
                              const AdamScalars<T>& scalars) {
  const AdamScalars<T> s = scalars;
  for (int64_t i = 0; i < count; ++i) {
    T p = param[i], m = exp_avg[i], v = exp_avg_sq[i], v_max = amsgrad ? max_exp_avg_sq[i] : T(0);
    adam_entry(p, grad[i], m, v, v_max, s, decays, amsgrad);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (amsgrad) max_exp_avg_sq[i] = v_max;
    param[i] = p;
  }
}

// max_exp_avg_sq null: no AMSGrad.
template <class T>
GRADSEL_INLINE void adam_math(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, int64_t count,
                              const AdamScalars<T>& s) {
  if (s.decay != 0 && max_exp_avg_sq)
    adam_loop<T, true, true>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, s);
  else if (s.decay != 0)
    adam_loop<T, true, false>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, s);
  else if (max_exp_avg_sq)
    adam_loop<T, false, true>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, s);
  else
    adam_loop<T, false, false>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, s);
}

// Rounding float32 parameters for a weight of 16 bits. Both loops leave in `param` exactly what the weight will hold.

// A bijection of 32 bits, with the constants of C. Wellons' search for small bias ("hash-prospector").
GRADSEL_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// Keys for the random words of a tensor's step t. They are the specification's random_keys, which gives the reasons.
struct RandomKeys {
  uint32_t first = 0, second = 0;

  RandomKeys() = default;
  GRADSEL_INLINE RandomKeys(int64_t seed, uint32_t t) {
    const uint32_t low = mix(static_cast<uint32_t>(seed));
    const uint32_t high = mix(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) ^ low);
    first = mix(t ^ low);
    second = mix(~t ^ high);
  }
};

// Rounds x to one of its two neighbours: away from zero if the word is below the fraction by which x exceeds the nearer
// to zero, in units of 2^-32, and otherwise towards zero.
GRADSEL_INLINE float stochastic_bfloat16(float x, uint32_t word) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = ((bits >> 16) + (word < bits << 16)) << 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? x : bit_cast<float>(rounded);  // a NaN would carry into the sign
}

GRADSEL_INLINE float stochastic_float16(float x, uint32_t word) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = ((bits >> 13) + (word < bits << 19)) << 13;
  // Below 2^-14 the numbers are the multiples of 2^-24; every product and difference here is exact.
  const bool small = magnitude < 0x38800000u;
  const float multiple = small ? bit_cast<float>(magnitude) * 0x1p24f : 0.0f;
  const int32_t whole = static_cast<int32_t>(multiple);
  const uint32_t fraction = static_cast<uint32_t>((multiple - static_cast<float>(whole)) * 0x1p32f);
  const uint32_t tiny = bit_cast<uint32_t>(static_cast<float>(whole + (word < fraction)) * 0x1p-24f);
  const uint32_t finite = small ? tiny | (bits & 0x80000000u) : rounded;
  return magnitude > 0x7f800000u ? x : bit_cast<float>(finite);
}

template <float (*round)(float, uint32_t)>
GRADSEL_INLINE void stochastic_loop(float* param, int64_t entry, int64_t count, RandomKeys keys) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t number = static_cast<uint64_t>(entry + i);
    const uint32_t once = mix(static_cast<uint32_t>(number) ^ keys.first);
    param[i] = round(param[i], mix(once ^ static_cast<uint32_t>(number >> 32) ^ keys.second));
  }
}

template <class Stored>
GRADSEL_INLINE void compensated_loop(float* GRADSEL_RESTRICT param, void* compensation, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float rounded = convert<float>(convert<Stored>(param[i]));
    const float lost = param[i] - rounded;
    const bool finite = std::abs(lost) <= std::numeric_limits<float>::max();
    static_cast<Stored*>(compensation)[i] = convert<Stored>(finite ? lost : 0.0f);
    param[i] = rounded;
  }
}

}  // namespace gradsel
