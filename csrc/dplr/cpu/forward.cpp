#include "dplr/cpu/columns.h"

namespace {

template <typename IO, int N>
struct Forward : Columns<IO, N> {
    using Base = Columns<IO, N>;
    using typename Base::T;
    using typename Base::Vec;
    using Base::Base, Base::p;

    void run(T* state) const {
        this->read_state(state, p.initial_state);
        Vec read[N], v[N], y[N];
        if (p.length) this->read_first(read, state, this->token(0).a);
        for (int64_t t = 0; t < p.length; ++t) {
            if (t % kPiece == 0) this->write_state(p.kept, state, t / kPiece, pieces(p));
            const int64_t next = t + 1 < p.length ? t + 1 : t;
            this->read_values(v, p.v, t);
            this->step(this->token(t), this->opens(t), this->token(next).a, state, state, v, read, y);
            this->write_values(p.y, t, y);
        }
        this->write_state(p.final_state, state);
    }
};

}  // namespace

namespace lm::LM_UNIT {

void dplr_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? run_blocks<Forward, Double>(p, from, to, scratch) : run_blocks<Forward, Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
