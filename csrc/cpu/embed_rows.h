// word + token type + position, one token at a time. Compiled once per instruction set.
#pragma once
#include "residual_sum.h"

namespace albert::ALBERT_ISA {

ALBERT_INLINE int64_t id_of(const albert_embedding& e, int64_t token) {
  return e.id_bytes == 8 ? static_cast<const int64_t*>(e.ids)[token] : static_cast<const int32_t*>(e.ids)[token];
}

template <class T>
ALBERT_INLINE const T* embedding(const albert_embedding& e, int64_t token) {
  return row_of<T>(e.table, e.stride, id_of(e, token));
}

// out = the sum, rounded to T, which out can hold.
template <class T, class Out>
inline void embedding_sum(const albert_embed_args& a, int64_t token, Out* out) {
  const T* word = a.inputs == nullptr ? embedding<T>(a.word, token) : row_of<T>(a.inputs, a.inputs_stride, token);
  const T* type = embedding<T>(a.token_type, token);
  const T* position = embedding<T>(a.position, token);
  for_columns(a.size, [&](int64_t j, int lanes) {
    const F v = add(add(load_part(word + j, lanes), load_part(type + j, lanes)), load_part(position + j, lanes));
    store_part(out + j, round_to(static_cast<const T*>(nullptr), v), lanes);
  });
}

}  // namespace albert::ALBERT_ISA
