// conv_pool forward on tile registers where an output sums few values (first layers, large strides): outputs
// x values under the kernel x pixels. float32 by three bfloat16 parts, bfloat16 by one (split.h).
//
// A strip of pooled rows has its input copied once, parted and padded: each row as 16 pixels side by side
// under two taps of the kernel, whatever stride and pool, which is a row of a tile of B. Rows of the kernel
// follow each other as rows of the input do, so that all rows of the map read the same copy. Products come
// out as rows of pixels: windows side by side are pooled vector by vector, and wait in cache until rows of an
// NCHW map are written.
//
// Tile registers work beside the vector units, but no further ahead of them than the processor looks. So a
// block of the map is pooled little by little between the products of the next, and a strip written between
// those of the next strip.
//
// What is not finite does not part, and shows as NaN: the host computes such images again by another kernel.
#pragma once

#include "conv_pool_columns_input.h"
#include "conv_pool_columns_output.h"

namespace {

// The scratch memory of a call.
template <int P>
struct ColumnsMemory {
  Half* b;
  float* shift;   // [outputs of a panel][16]
  float* map[2];  // of a block: [phases][outputs][rows][pixels]
  float* padded;
  uint32_t* words;
  int64_t *taps, *positions;
  TileProduct* products;
  float* ys[2];
  uint8_t* codes[2];
  int64_t bytes;

  ColumnsMemory(const ConvPoolShape& s, const ColumnsPlan<P>& plan, void* memory) {
    char* scratch = static_cast<char*>(memory);
    b = carve<Half>(scratch, plan.b_halves());
    shift = carve<float>(scratch, plan.panel * kTileSide);
    padded = carve<float>(scratch, ColumnsInput<P>::padded_size(plan));
    words = carve<uint32_t>(scratch, P * ColumnsInput<P>::part(s, plan));
    taps = carve<int64_t>(scratch, ColumnsInput<P>::tap_count(plan));
    positions = carve<int64_t>(scratch, s.positions());
    products = carve<TileProduct>(scratch, plan.most_products(plan.steps));
    for (int i = 0; i < 2; ++i) {
      map[i] = carve<float>(scratch, plan.map_floats());
      ys[i] = carve<float>(scratch, kColumnsOutputs * plan.windows);
      codes[i] = carve<uint8_t>(scratch, kColumnsOutputs * plan.windows);
    }
    bytes = scratch - static_cast<char*>(memory);
  }
};

template <int P>
int64_t columns_scratch_bytes(const ConvPoolShape& s) {
  return ColumnsMemory<P>(s, ColumnsPlan<P>(s), nullptr).bytes;
}

// c = shift + a b over all products, of R x C tiles: outputs, pixels. Those of A begin at a and a_next; of B
// each product tells its place, from b and b_next on. Sums go to c[outputs][pixels], rows c_bytes apart.
// Calls between() after each product.
template <int R, int C, typename Between>
void multiply_columns(const Half* a, const Half* a_next, const Half* b, const Half* b_next,
                      const TileProduct* products, int64_t count, const float* shift, float* const (&c)[2][2],
                      int64_t c_bytes, Between& between) {
  constexpr int64_t kShift = kTileSide * kTileSide;
  tile_load<0>(shift, kTileBytes);
  if constexpr (C > 1) tile_load<1>(shift, kTileBytes);
  if constexpr (R > 1) tile_load<2>(shift + kShift, kTileBytes);
  if constexpr (R > 1 && C > 1) tile_load<3>(shift + kShift, kTileBytes);
  for (int64_t i = 0; i < count; ++i) {
    const TileProduct p = products[i];
    if (p.a >= 0) {
      tile_load<4>(a + p.a * kTileValues, kTileBytes);
      if constexpr (R > 1) tile_load<5>(a_next + p.a * kTileValues, kTileBytes);
    }
    if (p.b >= 0) {
      tile_load<6>(b + p.b, kTileBytes);
      if constexpr (C > 1) tile_load<7>(b_next + p.b, kTileBytes);
    }
    tile_multiply<0, 4, 6>();
    if constexpr (C > 1) tile_multiply<1, 4, 7>();
    if constexpr (R > 1) tile_multiply<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tile_multiply<3, 5, 7>();
    between();
  }
  tile_store<0>(c[0][0], c_bytes);
  if constexpr (C > 1) tile_store<1>(c[0][1], c_bytes);
  if constexpr (R > 1) tile_store<2>(c[1][0], c_bytes);
  if constexpr (R > 1 && C > 1) tile_store<3>(c[1][1], c_bytes);
}

// `pieces` of work shared out evenly to `turns`.
class Shares {
 public:
  Shares(int64_t pieces, int64_t turns) : turns_(turns), whole_(pieces / turns), rest_(pieces % turns) {}
  CNNRNN_INLINE int64_t next() {
    credit_ += rest_;
    const bool more = credit_ >= turns_;
    credit_ -= more ? turns_ : 0;
    return whole_ + more;
  }

 private:
  int64_t turns_, whole_, rest_, credit_ = 0;
};

template <int P, typename T, int Q, bool kCodes>
struct ColumnsRun {
  const ConvPoolShape& s;
  const ColumnsPlan<P>& plan;
  const ColumnsMemory<P>& memory;
  ColumnsPool<P, Q, kCodes> pool;
  ColumnsWrite<P, T> write;
  const int64_t product_count;
  ColumnsStrip recent[3];  // strips: one is written, one pooled, one computed
  int64_t strips = 0, blocks = 0;

  ColumnsRun(const ConvPoolShape& s, const ColumnsPlan<P>& plan, const ColumnsMemory<P>& memory, T* y,
             uint8_t* code, T* kept, uint8_t* not_finite)
      : s(s),
        plan(plan),
        memory(memory),
        pool{s, plan, memory.positions, not_finite},
        write(s, plan, y, code, kept),
        product_count(plan.fill_products(memory.products)) {
    // What follows the last row of a strip meets weights of 0.
    for (int64_t i = 0; i < plan.b_columns() * plan.planes; ++i) {
      const int64_t end = plan.in_rows * plan.pairs * kTileDepth;
      __builtin_memset(memory.b + i * plan.plane + end, 0, (plan.plane - end) * sizeof(Half));
    }
    for (int64_t w = 0; w < s.positions(); ++w) {
      const int64_t down = w / s.window.w, right = w % s.window.w;
      memory.positions[w] = (down % s.step.h * plan.phases.w + right % s.step.w) * plan.map_phase +
                            down / s.step.h * plan.pitch + right / s.step.w;
    }
  }

  // A tile of pixels: where its columns of B begin, and where its map.
  struct Pixels {
    const Half* b;
    float* map;
  };

  template <typename Between>
  void multiply(const Pixels (&at)[2], int64_t count, int64_t outputs, const Half* weights,
                const float* shift, Between& between) {
    const bool two = outputs > kTileSide;
    const Pixels &first = at[0], &second = at[count - 1];
    const int64_t below = two ? kTileSide * plan.map_output : 0;
    float* const c[2][2] = {{first.map, second.map}, {first.map + below, second.map + below}};
    const auto with = [&](const auto& function) {
      function(weights, weights + plan.tile_size(), first.b, second.b, memory.products, product_count, shift,
               c, plan.map_output * 4, between);
    };
    if (two && count == 2)
      with(multiply_columns<2, 2, Between>);
    else if (two)
      with(multiply_columns<2, 1, Between>);
    else if (count == 2)
      with(multiply_columns<1, 2, Between>);
    else
      with(multiply_columns<1, 1, Between>);
  }

  // What was pooled last is a strip: it is written from now on.
  void finish_strip() {
    pool.finish();
    write.finish();
    write.start(pool.strip);
  }

  // The outputs of a strip, whose input has been filled; weights and shift: of the first of them.
  void compute(ColumnsStrip strip_at, const Half* weights, const float* shift) {
    ColumnsStrip& strip = recent[strips % 3];
    strip = strip_at;
    strip.ys = memory.ys[strips % 2], strip.codes = memory.codes[strips % 2];
    ++strips;
    const int64_t outputs = strip.outputs;
    const int64_t map_rows = strip.rows + plan.reach.h;
    const int64_t conv_rows = (strip.rows - 1) * s.step.h + s.window.h;
    const int64_t of_row = ceil_div(strip.columns + plan.reach.w, kTileSide);
    // Between the products of a block the one before is pooled, and a part of the strip before written.
    const int64_t tiles = plan.block_rows * plan.block_columns, phases = plan.phases.h * plan.phases.w;
    const int64_t slots = ceil_div(tiles * phases, 2) * product_count;
    const int64_t all_blocks = ceil_div(map_rows, plan.block_rows) * ceil_div(of_row, plan.block_columns);
    Shares pools(pool.pieces(strip, tiles), slots);
    Shares writes(write.pieces(s, strip), slots * larger(all_blocks - 1, 1));
    const auto between = [&]() __attribute__((always_inline)) {
      pool.some(pools.next());
      write.some(writes.next());
    };
    bool is_first = true;
    for (int64_t left = 0; left < of_row; left += plan.block_columns)
      for (int64_t top = 0; top < map_rows; top += plan.block_rows) {
        float* const map = memory.map[blocks++ % 2];
        const Pair last{smaller(top + plan.block_rows, map_rows), smaller(left + plan.block_columns, of_row)};
        Pixels pixels[2];
        int64_t count = 0;
        for (int64_t x = left; x < last.w; ++x)
          for (int64_t y = top; y < last.h; ++y)
            for (int64_t q = 0; q < phases; ++q) {
              const int64_t row = y * s.step.h + q / plan.phases.w;
              if (row >= conv_rows) continue;
              pixels[count++] = {memory.b + (x * plan.phases.w + q % plan.phases.w) * plan.column +
                                     row * s.stride.h * plan.pairs * kTileDepth,
                                 map + q * plan.map_phase + (y - top) * plan.pitch + (x - left) * kTileSide};
              if (count == 2) multiply(pixels, 2, outputs, weights, shift, between), count = 0;
            }
        if (count > 0) multiply(pixels, 1, outputs, weights, shift, between);
        pool.finish();
        if (is_first && strips > 1) finish_strip();
        is_first = false;
        if (plan.bordered) fill_border(s, plan, strip, map);
        pool.start(&strip, map, top, smaller(last.h, strip.rows), left,
                   smaller(last.w, ceil_div(strip.columns, kTileSide)));
      }
  }
};

// As PanelForward::run, for windows of Q positions, 0: any number.
template <int P, typename T, int Q, bool kCodes>
void run_columns_of(const ConvPoolShape& s, const T* x, const float* packed, const float* bias, T* y,
                    uint8_t* code, T* kept, uint8_t* not_finite, void* scratch, int64_t begin, int64_t end,
                    int64_t out_begin, int64_t out_end) {
  const ColumnsPlan<P> plan(s);
  const ColumnsMemory<P> memory(s, plan, scratch);
  const ColumnsInput<P> input{s, plan, memory.padded, memory.words, memory.taps};
  input.start();
  ColumnsRun<P, T, Q, kCodes> run(s, plan, memory, y, code, kept, not_finite);
  const TileSession session;
  for (int64_t panel = out_begin; panel < out_end; ++panel) {
    const int64_t k0 = panel * plan.panel, outputs = smaller(s.outputs - k0, plan.panel);
    for (int64_t k = 0; k < round_up(outputs, kTileSide); ++k)
      for (int64_t l = 0; l < kTileSide; ++l)
        memory.shift[k * kTileSide + l] = bias && k < outputs ? bias[k0 + k] : 0.0f;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / (plan.strips * plan.across), strip = unit % (plan.strips * plan.across);
      const int64_t row = strip / plan.across * plan.rows, column = strip % plan.across * plan.columns;
      const int64_t rows = smaller(plan.rows, s.pooled.h - row),
                    columns = smaller(plan.columns, s.pooled.w - column);
      const int64_t top = (row * s.step.h - s.margin.h) * s.stride.h - s.padding.h;
      const int64_t left = (column * s.step.w - s.margin.w) * s.stride.w - s.padding.w;
      for (int64_t i = 0; i < plan.in_rows; ++i)
        input.fill_row(x + image * s.channels * s.input.h * s.input.w, top + i, left, i, memory.b);
      for (int64_t k = 0; k < outputs; k += kColumnsOutputs)
        run.compute({image, row, rows, column, columns, k0 + k, smaller(outputs - k, kColumnsOutputs),
                     nullptr, nullptr},
                    reinterpret_cast<const Half*>(packed) + (k0 + k) / kTileSide * plan.tile_size(),
                    memory.shift + k * kTileSide);
    }
  }
  if (run.strips > 0) run.finish_strip();
  run.write.finish();
  stores_past_done();
}

template <int P, typename T, bool kCodes>
constexpr auto run_columns_with(int64_t positions) {
  return positions == 1   ? run_columns_of<P, T, 1, kCodes>
         : positions == 2 ? run_columns_of<P, T, 2, kCodes>
         : positions == 4 ? run_columns_of<P, T, 4, kCodes>
                          : run_columns_of<P, T, 0, kCodes>;
}
template <int P, typename T>
void run_columns(const ConvPoolShape& s, const T* x, const float* packed, const float* bias, T* y,
                 uint8_t* code, T* kept, uint8_t* not_finite, void* scratch, int64_t begin, int64_t end,
                 int64_t out_begin, int64_t out_end) {
  const auto run =
      code ? run_columns_with<P, T, true>(s.positions()) : run_columns_with<P, T, false>(s.positions());
  run(s, x, packed, bias, y, code, kept, not_finite, scratch, begin, end, out_begin, out_end);
}

template <int P, typename T>
constexpr cnnrnn::PanelForward<T> columns_forward() {
  return {columns_output_panels<P>, columns_packed_size<P>,   columns_pack<P, T>,
          columns_units<P>,         columns_scratch_bytes<P>, run_columns<P, T>};
}

}  // namespace
