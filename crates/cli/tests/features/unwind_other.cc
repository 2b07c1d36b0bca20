void call(void (*function)()) {
    struct Scope {
        bool &ended;
        ~Scope() { ended = true; }
    };
    static bool ended;
    Scope scope{ended};
    function();
}
