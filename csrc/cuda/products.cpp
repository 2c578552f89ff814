#include "products.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

namespace {

// What is used of cuBLASLt's C interface, as NVIDIA documents it (docs.nvidia.com/cuda/cublas, "Using the cuBLASLt
// API"): its own names, without their prefixes.
enum Status { SUCCESS = 0, NOT_SUPPORTED = 15 };
enum Type : int32_t { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum { COMPUTE_32F = 68 };
enum Operation : int32_t { OP_N = 0, OP_T = 1 };
enum Epilogue : uint32_t { DEFAULT = 1, GELU_AUX_BIAS = 164, DGELU_BGRAD = 208, BGRADB = 512 };
enum DescAttribute {
    TRANSA = 3,
    TRANSB = 4,
    EPILOGUE = 7,
    BIAS_POINTER = 8,
    EPILOGUE_AUX_POINTER = 11,
    EPILOGUE_AUX_LD = 12,
    BIAS_DATA_TYPE = 26
};
enum PreferenceAttribute {
    MAX_WORKSPACE_BYTES = 1,
    REDUCTION_SCHEME_MASK = 3,
    MIN_ALIGNMENT_A_BYTES = 5,
    MIN_ALIGNMENT_B_BYTES = 6,
    MIN_ALIGNMENT_C_BYTES = 7,
    MIN_ALIGNMENT_D_BYTES = 8
};
enum : uint32_t { REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

using Handle = struct HandleContents*;
using Desc = struct DescContents*;
using Layout = struct LayoutContents*;
using Preference = struct PreferenceContents*;

struct Algorithm {
    uint64_t data[8];
};

struct HeuristicResult {
    Algorithm algo;
    size_t workspace_size;
    int state;
    float waves_count;
    int reserved[4];
};

struct Functions {
    size_t (*GetVersion)();
    int (*Create)(Handle*);
    int (*Destroy)(Handle);
    int (*MatmulDescCreate)(Desc*, int compute_type, int scale_type);
    int (*MatmulDescDestroy)(Desc);
    int (*MatmulDescSetAttribute)(Desc, int attribute, const void* value, size_t bytes);
    int (*MatrixLayoutCreate)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t ld);
    int (*MatrixLayoutDestroy)(Layout);
    int (*MatmulPreferenceCreate)(Preference*);
    int (*MatmulPreferenceDestroy)(Preference);
    int (*MatmulPreferenceSetAttribute)(Preference, int attribute, const void* value, size_t bytes);
    int (*MatmulAlgoGetHeuristic)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int wanted,
                                  HeuristicResult*, int* found);
    int (*Matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                  const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t bytes,
                  void* stream);

    bool find(void* library) {
        auto find_one = [library](auto& function, const char* name) {
            char symbol[64];
            std::snprintf(symbol, sizeof symbol, "cublasLt%s", name);
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
            return function != nullptr;
        };
        return find_one(GetVersion, "GetVersion") && find_one(Create, "Create") && find_one(Destroy, "Destroy") &&
               find_one(MatmulDescCreate, "MatmulDescCreate") && find_one(MatmulDescDestroy, "MatmulDescDestroy") &&
               find_one(MatmulDescSetAttribute, "MatmulDescSetAttribute") &&
               find_one(MatrixLayoutCreate, "MatrixLayoutCreate") &&
               find_one(MatrixLayoutDestroy, "MatrixLayoutDestroy") &&
               find_one(MatmulPreferenceCreate, "MatmulPreferenceCreate") &&
               find_one(MatmulPreferenceDestroy, "MatmulPreferenceDestroy") &&
               find_one(MatmulPreferenceSetAttribute, "MatmulPreferenceSetAttribute") &&
               find_one(MatmulAlgoGetHeuristic, "MatmulAlgoGetHeuristic") && find_one(Matmul, "Matmul");
    }
};

// cuBLASLt's matrices are column-major: a row-major matrix [rows, columns] is its transpose [columns, rows] there, and
// the row stride is the leading dimension.
struct Matrix {
    const void* data;
    int64_t rows, columns, ld;
    Type type;
};

Matrix transposed(const void* data, int64_t rows, int64_t columns, int64_t stride, Type type) {
    return {data, columns, rows, stride, type};
}

// d = op(a) op(b) + beta d, and what the epilogue makes of it.
struct Product {
    Matrix a, b, d;
    Operation transpose_a, transpose_b;
    Epilogue epilogue;
    const void* bias;  // of d's type, read or written
    const void* aux;   // shaped and typed like d, read or written
    int64_t aux_ld;
    bool accumulate;
};

int bytes_of(Type type) { return type == R_32F ? 4 : 2; }

// The largest power of two up to 256, the default of cuBLASLt's preferences, that divides the address.
uint32_t alignment(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
    return static_cast<uint32_t>(address & (~address + 1));
}

int check(const Product& product) {
    for (const Matrix* matrix : {&product.a, &product.b, &product.d}) {
        if (matrix->data == nullptr || matrix->rows <= 0 || matrix->columns <= 0 || matrix->ld < matrix->rows ||
            std::max(matrix->ld, matrix->columns) > INT32_MAX)
            return ALBERT_PRODUCTS_BAD_ARGUMENT;
        if (alignment(matrix->data) < 16 || matrix->ld * bytes_of(matrix->type) % 16 != 0)
            return ALBERT_PRODUCTS_UNALIGNED;
    }
    const bool has_aux = product.epilogue == GELU_AUX_BIAS || product.epilogue == DGELU_BGRAD;
    if (has_aux != (product.aux != nullptr) || (product.epilogue != DEFAULT) != (product.bias != nullptr))
        return ALBERT_PRODUCTS_BAD_ARGUMENT;
    if (has_aux && product.aux_ld < product.d.rows) return ALBERT_PRODUCTS_BAD_ARGUMENT;
    // cuBLASLt asks for a leading dimension of the auxiliary matrix that is divisible by 8.
    if (has_aux && (product.aux_ld % 8 != 0 || alignment(product.aux) < 16)) return ALBERT_PRODUCTS_UNALIGNED;
    if (product.bias != nullptr && alignment(product.bias) < 16) return ALBERT_PRODUCTS_UNALIGNED;
    return 0;
}

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 18>;

Key key_of(const Product& p, const albert_products_place& place) {
    return {p.epilogue,
            p.a.type,
            p.d.rows,
            p.d.columns,
            p.transpose_a == OP_N ? p.a.columns : p.a.rows,
            p.transpose_a,
            p.transpose_b,
            p.a.ld,
            p.b.ld,
            p.d.ld,
            p.aux_ld,
            alignment(p.a.data),
            alignment(p.b.data),
            alignment(p.d.data),
            p.aux == nullptr ? 0 : alignment(p.aux),
            p.bias == nullptr ? 0 : alignment(p.bias),
            p.accumulate,
            static_cast<int64_t>(place.workspace_bytes)};
}

// Descriptors and algorithm of one key.
struct Plan {
    Desc desc = nullptr;
    Layout a = nullptr, b = nullptr, d = nullptr;
    HeuristicResult result = {};
    int error = 0;
};

// Token counts that differ from batch to batch make a plan each: so many are kept.
constexpr size_t MOST_PLANS = 4096;

}  // namespace

struct albert_products {
    void* library = nullptr;
    Functions lt = {};
    Handle handle = nullptr;
    std::mutex mutex;
    std::map<Key, Plan> plans;

    ~albert_products() {
        forget();
        if (handle != nullptr) lt.Destroy(handle);
        if (library != nullptr) dlclose(library);
    }

    void forget() {
        for (auto& [key, plan] : plans) {
            if (plan.desc != nullptr) lt.MatmulDescDestroy(plan.desc);
            for (Layout layout : {plan.a, plan.b, plan.d})
                if (layout != nullptr) lt.MatrixLayoutDestroy(layout);
        }
        plans.clear();
    }

    template <class T>
    int set(Desc desc, DescAttribute attribute, const T& value) const {
        return lt.MatmulDescSetAttribute(desc, attribute, &value, sizeof value);
    }

    int set_pointers(Desc desc, const Product& p) const {
        int status = SUCCESS;
        if (p.bias != nullptr) status = set(desc, BIAS_POINTER, p.bias);
        if (status == SUCCESS && p.aux != nullptr) status = set(desc, EPILOGUE_AUX_POINTER, p.aux);
        return status;
    }

    int describe(Plan& plan, const Product& p) const {
        int status = lt.MatmulDescCreate(&plan.desc, COMPUTE_32F, R_32F);
        if (status == SUCCESS) status = set(plan.desc, TRANSA, p.transpose_a);
        if (status == SUCCESS) status = set(plan.desc, TRANSB, p.transpose_b);
        if (status == SUCCESS) status = set(plan.desc, EPILOGUE, p.epilogue);
        // The default is the same. Said, so that a library that disagrees refuses and does not write something else.
        if (status == SUCCESS && p.bias != nullptr) status = set(plan.desc, BIAS_DATA_TYPE, p.d.type);
        if (status == SUCCESS && p.aux != nullptr) status = set(plan.desc, EPILOGUE_AUX_LD, p.aux_ld);
        // Heuristics look at the pointers' alignment.
        if (status == SUCCESS) status = set_pointers(plan.desc, p);
        const std::array<std::pair<Layout*, const Matrix*>, 3> layouts = {
            {{&plan.a, &p.a}, {&plan.b, &p.b}, {&plan.d, &p.d}}};
        for (const auto& [layout, matrix] : layouts) {
            if (status != SUCCESS) break;
            const auto rows = static_cast<uint64_t>(matrix->rows), columns = static_cast<uint64_t>(matrix->columns);
            status = lt.MatrixLayoutCreate(layout, matrix->type, rows, columns, matrix->ld);
        }
        return status;
    }

    int choose(Plan& plan, const Product& p, const albert_products_place& place) const {
        Preference preference = nullptr;
        int status = lt.MatmulPreferenceCreate(&preference);
        if (status != SUCCESS) return status;
        auto prefer = [&](PreferenceAttribute attribute, auto value) {
            if (status == SUCCESS)
                status = lt.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
        };
        prefer(MAX_WORKSPACE_BYTES, static_cast<uint64_t>(place.workspace_bytes));
        prefer(MIN_ALIGNMENT_A_BYTES, alignment(p.a.data));
        prefer(MIN_ALIGNMENT_B_BYTES, alignment(p.b.data));
        prefer(MIN_ALIGNMENT_C_BYTES, alignment(p.d.data));
        prefer(MIN_ALIGNMENT_D_BYTES, alignment(p.d.data));
        // A product that is split along its depth adds up the parts in float32.
        if (p.d.type != R_32F) prefer(REDUCTION_SCHEME_MASK, uint32_t{REDUCTION_SCHEME_COMPUTE_TYPE});
        int found = 0;
        if (status == SUCCESS)
            status = lt.MatmulAlgoGetHeuristic(handle, plan.desc, plan.a, plan.b, plan.d, plan.d, preference, 1,
                                               &plan.result, &found);
        lt.MatmulPreferenceDestroy(preference);
        if (status == SUCCESS && (found == 0 || plan.result.state != SUCCESS)) status = NOT_SUPPORTED;
        return status;
    }

    static int code(int status) {
        if (status == SUCCESS) return 0;
        return status == NOT_SUPPORTED ? ALBERT_PRODUCTS_UNSUPPORTED : ALBERT_PRODUCTS_STATUS + status;
    }

    int run(const Product& p, const albert_products_place* place) {
        if (place == nullptr || alignment(place->workspace) < 256) return ALBERT_PRODUCTS_BAD_ARGUMENT;
        if (const int error = check(p)) return error;
        // Also while it is started: a plan's descriptor holds one call's pointers.
        const std::lock_guard<std::mutex> guard(mutex);
        const Key key = key_of(p, *place);
        auto place_of_plan = plans.find(key);
        if (place_of_plan == plans.end()) {
            if (plans.size() >= MOST_PLANS) forget();
            place_of_plan = plans.emplace(key, Plan{}).first;
            Plan& plan = place_of_plan->second;
            int status = describe(plan, p);
            if (status == SUCCESS) status = choose(plan, p, *place);
            plan.error = code(status);
        }
        Plan& plan = place_of_plan->second;
        if (plan.error != 0) return plan.error;
        if (const int status = set_pointers(plan.desc, p)) return code(status);
        const float alpha = 1.0F, beta = p.accumulate ? 1.0F : 0.0F;
        void* d = const_cast<void*>(p.d.data);
        return code(lt.Matmul(handle, plan.desc, &alpha, p.a.data, plan.a, p.b.data, plan.b, &beta, d, plan.d, d,
                              plan.d, &plan.result.algo, place->workspace, place->workspace_bytes, place->stream));
    }
};

namespace {

bool type_of(int dtype, Type& type) {
    type = dtype == ALBERT_PRODUCTS_F16 ? R_16F : R_16BF;
    return dtype == ALBERT_PRODUCTS_F16 || dtype == ALBERT_PRODUCTS_BF16;
}

void* load(const char* path) {
    if (path != nullptr) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    // PyTorch's own first: it must not be joined by another version.
    for (const int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL})
        for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
            if (void* library = dlopen(name, mode)) return library;
    return nullptr;
}

}  // namespace

extern "C" {

int albert_products_open(const char* path, albert_products** products, char* reason, size_t reason_bytes) {
    std::snprintf(reason, reason_bytes, "%s", "");
    auto* opened = new (std::nothrow) albert_products;
    *products = nullptr;
    if (opened == nullptr) return ALBERT_PRODUCTS_STATUS + 3;  // CUBLAS_STATUS_ALLOC_FAILED
    int error = 0;
    opened->library = load(path);
    if (opened->library == nullptr) {
        const char* said = dlerror();
        std::snprintf(reason, reason_bytes, "%s", said == nullptr ? "" : said);
        error = ALBERT_PRODUCTS_NO_LIBRARY;
    } else if (!opened->lt.find(opened->library) || opened->lt.GetVersion() < 120000) {
        error = ALBERT_PRODUCTS_OLD_LIBRARY;
    } else {
        error = albert_products::code(opened->lt.Create(&opened->handle));
    }
    if (error != 0) {
        delete opened;
        return error;
    }
    *products = opened;
    return 0;
}

void albert_products_close(albert_products* products) { delete products; }

int albert_products_version(const albert_products* products) { return static_cast<int>(products->lt.GetVersion()); }

const char* albert_products_message(int code) {
    switch (code) {
        case 0: return "no error";
        case ALBERT_PRODUCTS_BAD_ARGUMENT: return "a size, stride or pointer is not what was expected";
        case ALBERT_PRODUCTS_UNALIGNED: return "rows do not begin at multiples of 16 bytes";
        case ALBERT_PRODUCTS_UNSUPPORTED: return "cuBLASLt has no algorithm for this product on this device";
        case ALBERT_PRODUCTS_NO_LIBRARY: return "libcublasLt is not found";
        case ALBERT_PRODUCTS_OLD_LIBRARY: return "libcublasLt is older than 12.0";
        case ALBERT_PRODUCTS_STATUS + 1: return "CUBLAS_STATUS_NOT_INITIALIZED, as without a GPU or a driver for this version";
        case ALBERT_PRODUCTS_STATUS + 3: return "CUBLAS_STATUS_ALLOC_FAILED, out of memory";
        case ALBERT_PRODUCTS_STATUS + 7: return "CUBLAS_STATUS_INVALID_VALUE";
        case ALBERT_PRODUCTS_STATUS + 8: return "CUBLAS_STATUS_ARCH_MISMATCH";
        case ALBERT_PRODUCTS_STATUS + 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case ALBERT_PRODUCTS_STATUS + 14: return "CUBLAS_STATUS_INTERNAL_ERROR";
        default: return "an error of cuBLASLt";
    }
}

// The products are written transposed, (x wᵀ)ᵀ = w xᵀ: what is row-major outside is column-major to cuBLASLt.

int albert_products_linear_gelu(albert_products* products, const albert_products_place* place, int dtype,
                                int64_t tokens, int64_t in, int64_t out, const void* x, int64_t x_stride,
                                const void* weight, const void* bias, void* y, int64_t y_stride, void* inner,
                                int64_t inner_stride) {
    Type type;
    if (products == nullptr || !type_of(dtype, type)) return ALBERT_PRODUCTS_BAD_ARGUMENT;
    Product product = {};
    product.a = transposed(weight, out, in, in, type);  // [in, out]
    product.b = transposed(x, tokens, in, x_stride, type);  // [in, tokens]
    product.d = transposed(y, tokens, out, y_stride, type);  // [out, tokens]
    product.transpose_a = OP_T;
    product.transpose_b = OP_N;
    product.epilogue = GELU_AUX_BIAS;
    product.bias = bias;
    product.aux = inner;
    product.aux_ld = inner_stride;
    return products->run(product, place);
}

int albert_products_gelu_gradient(albert_products* products, const albert_products_place* place, int dtype,
                                  int64_t tokens, int64_t in, int64_t out, const void* grad, int64_t grad_stride,
                                  const void* weight, const void* inner, int64_t inner_stride, void* grad_inner,
                                  int64_t grad_inner_stride, void* grad_bias) {
    Type type;
    if (products == nullptr || !type_of(dtype, type)) return ALBERT_PRODUCTS_BAD_ARGUMENT;
    Product product = {};
    product.a = transposed(weight, in, out, out, type);  // [out, in]
    product.b = transposed(grad, tokens, in, grad_stride, type);  // [in, tokens]
    product.d = transposed(grad_inner, tokens, out, grad_inner_stride, type);  // [out, tokens]
    product.transpose_a = product.transpose_b = OP_N;
    product.epilogue = DGELU_BGRAD;
    product.bias = grad_bias;
    product.aux = inner;
    product.aux_ld = inner_stride;
    return products->run(product, place);
}

int albert_products_weight_gradient(albert_products* products, const albert_products_place* place, int dtype,
                                    int64_t tokens, int64_t in, int64_t out, const void* grad, int64_t grad_stride,
                                    const void* x, int64_t x_stride, float* grad_weight, int accumulate,
                                    float* grad_bias) {
    Type type;
    if (products == nullptr || !type_of(dtype, type)) return ALBERT_PRODUCTS_BAD_ARGUMENT;
    Product product = {};
    product.a = transposed(x, tokens, in, x_stride, type);  // [in, tokens]
    product.b = transposed(grad, tokens, out, grad_stride, type);  // [out, tokens]
    product.d = transposed(grad_weight, out, in, in, R_32F);  // [in, out]
    product.transpose_a = OP_N;
    product.transpose_b = OP_T;
    // The gradient is the second operand here, and its sums along the depth are one for each column of d.
    product.epilogue = grad_bias == nullptr ? DEFAULT : BGRADB;
    product.bias = grad_bias;
    product.accumulate = accumulate != 0;
    return products->run(product, place);
}

}  // extern "C"
