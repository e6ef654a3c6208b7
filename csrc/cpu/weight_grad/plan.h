// What selected_weight_grad works through: chunks of tokens, blocks of columns, and scratch memory for both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace gradsel {

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kVector = 16;  // elements of the longest register

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The columns that each row selects.
struct SelectedColumns {
  const int32_t* cols;
  const int64_t* offsets;  // null: k to a row
  int64_t k;
  int64_t first(int64_t row) const { return offsets ? offsets[row] : row * k; }
};

// Whole batches, or a range of tokens of one batch.
struct TokenChunk {
  int64_t batch, batches, token, tokens;
  int64_t size() const { return batches * tokens; }
};

// The tokens of all batches cut into chunks of about `target`.
class TokenChunks {
 public:
  TokenChunks(int64_t batches, int64_t tokens, int64_t target) : batches_(batches), tokens_(tokens), length_(tokens) {
    if (tokens < target)
      per_chunk_ = target / tokens;
    else  // pairs of vectors, as the sums take them
      length_ = divide_up(divide_up(tokens, divide_up(tokens, target)), 2 * kVector) * 2 * kVector;
    per_batch_ = divide_up(tokens, length_);
  }
  int64_t count() const { return divide_up(batches_, per_chunk_) * per_batch_; }
  int64_t longest() const { return std::min(per_chunk_, batches_) * std::min(length_, tokens_); }
  TokenChunk operator[](int64_t i) const {
    const int64_t batch = i / per_batch_ * per_chunk_, token = i % per_batch_ * length_;
    return {batch, std::min(per_chunk_, batches_ - batch), token, std::min(length_, tokens_ - token)};
  }

 private:
  int64_t batches_, tokens_, length_, per_chunk_ = 1, per_batch_;
};

// Blocks of `width` columns that hold a selected one, and the selection in terms of these blocks laid side by side.
template <int64_t width>
class UsedBlocks {
 public:
  UsedBlocks(const SelectedColumns& all, int64_t nnz, int64_t n) : selected_(all) {
    const int64_t count = divide_up(n, width);
    blocks_.reserve(static_cast<size_t>(count));
    if (nnz >= 4 * n) {  // few would be left out, and packing costs little beside so many sums
      for (int64_t b = 0; b < count; ++b) blocks_.push_back(b);
      return;
    }
    std::vector<int64_t> place(static_cast<size_t>(count), -1);
    for (int64_t e = 0; e < nnz; ++e) place[all.cols[e] / width] = 0;
    for (int64_t b = 0; b < count; ++b) {
      if (place[b] < 0) continue;
      place[b] = static_cast<int64_t>(blocks_.size());
      blocks_.push_back(b);
    }
    cols_.reserve(static_cast<size_t>(nnz));
    for (int64_t e = 0; e < nnz; ++e)
      cols_.push_back(static_cast<int32_t>(place[all.cols[e] / width] * width + all.cols[e] % width));
    selected_.cols = cols_.data();
  }
  UsedBlocks(const UsedBlocks&) = delete;
  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t column(int64_t i) const { return blocks_[i] * width; }  // the first of block i
  const SelectedColumns& selected() const { return selected_; }

 private:
  SelectedColumns selected_;
  std::vector<int64_t> blocks_;
  std::vector<int32_t> cols_;
};

// Uninitialised memory that starts on a cache line: a vector that straddles two takes twice as long to load.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new char[static_cast<size_t>(count) * sizeof(T) + kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    start_ = reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
  }
  T* get() const { return start_; }

 private:
  std::unique_ptr<char[]> memory_;
  T* start_;
};

}  // namespace gradsel
