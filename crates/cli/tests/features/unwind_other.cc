// In a section that is put together with that of the other object.
__attribute__((section("throwing"))) void call(void (*function)()) {
    struct Scope {
        bool &ended;
        ~Scope() { ended = true; }
    };
    static bool ended;
    Scope scope{ended};
    function();
}
