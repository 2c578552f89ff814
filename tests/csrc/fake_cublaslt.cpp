// A stand-in for libcublasLt on a machine without a GPU: the functions that csrc/cuda/products.cpp uses, on memory of
// the host, by plain loops, after NVIDIA's documentation (docs.nvidia.com/cuda/cublas). It includes nothing of csrc, and
// is strict: what the documentation does not allow, or what the caller did not say, ends the process.
//
// FAKE_CUBLASLT=refuse: no algorithm is found. FAKE_CUBLASLT=wrong: bias gradients are twice what they should be.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

#define REQUIRE(condition)                                                                       \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            std::fprintf(stderr, "fake cublasLt: %s, line %d: %s\n", __func__, __LINE__, #condition); \
            std::abort();                                                                        \
        }                                                                                        \
    } while (0)

constexpr int CUBLAS_STATUS_SUCCESS = 0;
constexpr int CUBLAS_COMPUTE_32F = 68;
constexpr int CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14;
constexpr int CUBLAS_OP_N = 0, CUBLAS_OP_T = 1;
constexpr uint32_t EPILOGUE_DEFAULT = 1, EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4, EPILOGUE_DGELU_BGRAD = 64 | 128 | 16;
constexpr uint32_t EPILOGUE_BGRADB = 512;
constexpr int64_t UNSET = -1;

struct Descriptor {
    int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N, bias_type = UNSET;
    uint32_t epilogue = EPILOGUE_DEFAULT;
    void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_ld = UNSET;
};

struct Layout {
    int32_t type;
    int64_t rows, columns, ld;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t reduction_schemes = 7;
    uint32_t alignments[4] = {256, 256, 256, 256};  // of A, B, C, D
};

struct Algorithm {
    uint64_t problem;  // a digest of what it was chosen for
    uint64_t workspace;
    uint32_t alignments[4];
    uint64_t of_bias, of_aux;
    uint64_t unused[2];
};
static_assert(sizeof(Algorithm) == 64);

struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int handles, heuristics;

bool told(const char* what) {
    const char* value = std::getenv("FAKE_CUBLASLT");
    return value != nullptr && std::strcmp(value, what) == 0;
}

template <class T>
void read(T& target, const void* value, size_t bytes) {
    REQUIRE(value != nullptr && bytes == sizeof(T));
    std::memcpy(&target, value, bytes);
}

uint64_t alignment(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return address & (~address + 1);
}

// ---------------------------------------------------------------------------------------------------------- elements

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                  : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                   : std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

uint16_t to_half(double value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    value = std::fabs(value);
    if (std::isnan(value)) return 0x7e00;
    if (value == 0.0) return sign;
    if (value >= 65520.0) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(value, &exponent);
    exponent = exponent < -13 ? -13 : exponent;                             // subnormals share the smallest one
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(value, 11 - exponent)));  // to even
    return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps));
}

float from_bfloat(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double load(const void* data, int type, int64_t index) {
    if (type == CUDA_R_32F) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return type == CUDA_R_16F ? from_half(bits) : from_bfloat(bits);
}

void store(void* data, int type, int64_t index, double value) {
    const auto single = static_cast<float>(value);
    if (type == CUDA_R_32F)
        static_cast<float*>(data)[index] = single;
    else
        static_cast<uint16_t*>(data)[index] = type == CUDA_R_16F ? to_half(value) : to_bfloat(single);
}

// ------------------------------------------------------------------------------------------------------- the problem

struct Problem {
    int64_t m, n, k;
    bool has_aux, has_bias;
};

// Checks all that does not depend on where matrices lie.
Problem problem_of(const Descriptor& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const bool ta = desc.transpose_a == CUBLAS_OP_T, tb = desc.transpose_b == CUBLAS_OP_T;
    const Problem problem = {d.rows, d.columns, ta ? a.rows : a.columns,
                             desc.epilogue == EPILOGUE_GELU_AUX_BIAS || desc.epilogue == EPILOGUE_DGELU_BGRAD,
                             desc.epilogue != EPILOGUE_DEFAULT};
    REQUIRE((ta ? a.columns : a.rows) == problem.m);
    REQUIRE((tb ? b.columns : b.rows) == problem.k);
    REQUIRE((tb ? b.rows : b.columns) == problem.n);
    REQUIRE(c.type == d.type && c.rows == d.rows && c.columns == d.columns && c.ld == d.ld);
    // Of the table of supported types: A and B alike, 16 bits, results alike or in float32.
    REQUIRE((a.type == CUDA_R_16F || a.type == CUDA_R_16BF) && b.type == a.type);
    REQUIRE(d.type == a.type || d.type == CUDA_R_32F);
    if (problem.has_bias) {
        REQUIRE(desc.bias != nullptr);
        REQUIRE(desc.bias_type == UNSET || desc.bias_type == d.type);
    }
    if (problem.has_aux) {
        REQUIRE(d.type == a.type);
        REQUIRE(desc.aux != nullptr && alignment(desc.aux) >= 16);
        REQUIRE(desc.aux_ld >= d.rows && desc.aux_ld % 8 == 0);
    }
    // A card answers NOT_SUPPORTED where B is not transposed.
    if (desc.epilogue == EPILOGUE_BGRADB) REQUIRE(tb);
    return problem;
}

uint64_t digest(const Descriptor& desc, const Layout& a, const Layout& b, const Layout& d) {
    uint64_t total = 14695981039346656037U;
    const int64_t parts[] = {desc.transpose_a, desc.transpose_b, desc.epilogue, desc.bias_type, desc.aux_ld, a.type,
                             a.rows,           a.columns,        a.ld,          b.type,         b.rows,      b.columns,
                             b.ld,             d.type,           d.rows,        d.columns,      d.ld};
    for (const int64_t part : parts) total = (total ^ static_cast<uint64_t>(part)) * 1099511628211U;
    return total;
}

double gelu(double x) { return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

double gelu_slope(double x) {
    const double tanh = std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x);
}

}  // namespace

extern "C" {

int fake_cublaslt_heuristics() { return heuristics; }

size_t cublasLtGetVersion() { return 130000; }

int cublasLtCreate(void** handle) {
    *handle = &handles;
    ++handles;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtDestroy(void* handle) {
    REQUIRE(handle == &handles && handles > 0);
    --handles;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulDescCreate(Descriptor** desc, int compute_type, int scale_type) {
    REQUIRE(compute_type == CUBLAS_COMPUTE_32F && scale_type == CUDA_R_32F);
    *desc = new Descriptor;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulDescDestroy(Descriptor* desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulDescSetAttribute(Descriptor* desc, int attribute, const void* value, size_t bytes) {
    REQUIRE(desc != nullptr);
    switch (attribute) {
        case 3: read(desc->transpose_a, value, bytes); break;
        case 4: read(desc->transpose_b, value, bytes); break;
        case 7: read(desc->epilogue, value, bytes); break;
        case 8: read(desc->bias, value, bytes); break;
        case 11: read(desc->aux, value, bytes); break;
        case 12: read(desc->aux_ld, value, bytes); break;
        case 26: read(desc->bias_type, value, bytes); break;
        default: REQUIRE(!"an attribute of a product that this file knows");
    }
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    REQUIRE(rows > 0 && columns > 0 && ld >= static_cast<int64_t>(rows));
    *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), ld};
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    REQUIRE(preference != nullptr);
    switch (attribute) {
        case 1: read(preference->workspace, value, bytes); break;
        case 3: read(preference->reduction_schemes, value, bytes); break;
        case 5:
        case 6:
        case 7:
        case 8: read(preference->alignments[attribute - 5], value, bytes); break;
        default: REQUIRE(!"an attribute of a preference that this file knows");
    }
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, Descriptor* desc, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int wanted, HeuristicResult* results, int* found) {
    REQUIRE(handle == &handles && handles > 0 && wanted >= 1);
    problem_of(*desc, *a, *b, *c, *d);
    ++heuristics;
    *found = told("refuse") ? 0 : 1;
    results[0] = {};
    Algorithm& algorithm = results[0].algorithm;
    algorithm.problem = digest(*desc, *a, *b, *d);
    // Takes all that was promised.
    algorithm.workspace = results[0].workspace = preference->workspace;
    std::memcpy(algorithm.alignments, preference->alignments, sizeof algorithm.alignments);
    algorithm.of_bias = desc->bias == nullptr ? 0 : alignment(desc->bias);
    algorithm.of_aux = desc->aux == nullptr ? 0 : alignment(desc->aux);
    return CUBLAS_STATUS_SUCCESS;
}

int cublasLtMatmul(void* handle, Descriptor* desc, const float* alpha, const void* a, Layout* a_layout, const void* b,
                   Layout* b_layout, const float* beta, const void* c, Layout* c_layout, void* d, Layout* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void*) {
    REQUIRE(handle == &handles && handles > 0);
    const Problem problem = problem_of(*desc, *a_layout, *b_layout, *c_layout, *d_layout);
    REQUIRE(algorithm != nullptr && algorithm->problem == digest(*desc, *a_layout, *b_layout, *d_layout));
    const void* matrices[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        REQUIRE(matrices[i] != nullptr && alignment(matrices[i]) >= algorithm->alignments[i]);
        REQUIRE(algorithm->alignments[i] >= 16);
    }
    // The pointers at the heuristic's time said how far the others are aligned; 256 bytes are as good as more.
    if (problem.has_bias) REQUIRE(alignment(desc->bias) >= (algorithm->of_bias < 256 ? algorithm->of_bias : 256));
    if (problem.has_aux) REQUIRE(alignment(desc->aux) >= (algorithm->of_aux < 256 ? algorithm->of_aux : 256));
    REQUIRE(workspace_bytes >= algorithm->workspace && alignment(workspace) >= (workspace_bytes ? 256 : 0));
    if (workspace_bytes) std::memset(workspace, 0xA5, workspace_bytes < 4096 ? workspace_bytes : 4096);

    const auto [m, n, k, has_aux, has_bias] = problem;
    std::vector<double> left(m * k), right(n * k);  // [m, k] and [n, k]
    for (int64_t p = 0; p < k; ++p) {
        for (int64_t i = 0; i < m; ++i) {
            const bool t = desc->transpose_a == CUBLAS_OP_T;
            left[i * k + p] = load(a, a_layout->type, t ? p + i * a_layout->ld : i + p * a_layout->ld);
        }
        for (int64_t j = 0; j < n; ++j) {
            const bool t = desc->transpose_b == CUBLAS_OP_T;
            right[j * k + p] = load(b, b_layout->type, t ? j + p * b_layout->ld : p + j * b_layout->ld);
        }
    }
    const int type = d_layout->type;
    const double sums_times = told("wrong") ? 2.0 : 1.0;
    std::vector<double> sums(m);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
            double value = 0.0;
            for (int64_t p = 0; p < k; ++p) value += left[i * k + p] * right[j * k + p];
            value *= *alpha;
            const int64_t index = i + j * d_layout->ld, aux_index = i + j * desc->aux_ld;
            if (*beta != 0.0F) value += *beta * load(c, type, i + j * c_layout->ld);
            if (desc->epilogue == EPILOGUE_GELU_AUX_BIAS) {
                value += load(desc->bias, type, i);
                store(desc->aux, type, aux_index, value);
                value = gelu(value);
            } else if (desc->epilogue == EPILOGUE_DGELU_BGRAD) {
                value *= gelu_slope(load(desc->aux, type, aux_index));
                sums[i] += value;
            }
            store(d, type, index, value);
        }
    if (desc->epilogue == EPILOGUE_DGELU_BGRAD)
        for (int64_t i = 0; i < m; ++i) store(desc->bias, type, i, sums_times * sums[i]);
    if (desc->epilogue == EPILOGUE_BGRADB)
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < k; ++p) sum += right[j * k + p];
            store(desc->bias, type, j, sums_times * sum);
        }
    return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
