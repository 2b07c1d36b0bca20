//! Real programs: SQLite and Lua from their sources, Debian's static libraries. Each behaves as its native build.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, WAYS, available, compile, native, tool, ways_of_llvm};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// Returns the folder of a package of sources among the tests' dependencies.
fn package(name: &str) -> PathBuf {
    static METADATA: OnceLock<serde_json::Value> = OnceLock::new();
    let metadata = METADATA.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["metadata", "--format-version", "1", "--locked"]).current_dir(common::root());
        serde_json::from_str(&tool(&mut cargo)).unwrap()
    });
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == name).unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned()
}

/// Checks that a program of objects gives the same in every way of running it as natively.
fn same_as_native(objects: &[PathBuf], libraries: &[&str], args: &[&str]) -> common::Output {
    let expected = native("cc", objects, libraries, args, b"");
    for way in WAYS {
        let run = Farlink::new().arg("run").args(way).args(objects).args(libraries).arg("--").args(args);
        assert_eq!(run.output(), expected, "{way:?}");
    }
    for way in ways_of_llvm("same_as_native") {
        let run = Farlink::new().arg("run").args(&way).args(objects).args(libraries).arg("--").args(args);
        assert_eq!(run.output(), expected, "{way:?}");
    }
    expected
}

const SQLITE_DRIVER: &str = r#"
    #include <stdio.h>
    #include <stdlib.h>
    #include "sqlite3.h"

    static sqlite3 *db;

    static void check(int status, int wanted) {
        if (status == wanted) return;
        fprintf(stderr, "sqlite: %s\n", sqlite3_errmsg(db));
        exit(1);
    }

    static void run(const char *sql) { check(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK); }

    int main(int argc, char **argv) {
        int rows = argc > 1 ? atoi(argv[1]) : 100000;
        check(sqlite3_open(":memory:", &db), SQLITE_OK);
        run("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);"
            "CREATE TABLE sale (item INTEGER REFERENCES item, count INTEGER);"
            "CREATE INDEX by_item ON sale (item); BEGIN");
        sqlite3_stmt *insert;
        check(sqlite3_prepare_v2(db, "INSERT INTO sale VALUES (?1 % 97, ?1 * 7919 % 1000)", -1, &insert, NULL), SQLITE_OK);
        for (int i = 0; i < rows; i++) {
            sqlite3_bind_int(insert, 1, i);
            check(sqlite3_step(insert), SQLITE_DONE);
            sqlite3_reset(insert);
        }
        sqlite3_finalize(insert);
        run("INSERT INTO item SELECT DISTINCT item, printf('item %03d', item), item * 1.25 FROM sale; COMMIT");
        sqlite3_stmt *query;
        check(sqlite3_prepare_v2(db,
            "SELECT name, sum(count), round(sum(count * price), 2) FROM sale JOIN item ON item.id = sale.item"
            " GROUP BY name HAVING sum(count) > 0 ORDER BY 2 DESC, 1", -1, &query, NULL), SQLITE_OK);
        unsigned long checksum = 0;
        int groups = 0;
        while (sqlite3_step(query) == SQLITE_ROW) {
            if (groups++ < 3)
                printf("%s %d %.2f\n", sqlite3_column_text(query, 0), sqlite3_column_int(query, 1),
                       sqlite3_column_double(query, 2));
            for (const unsigned char *c = sqlite3_column_text(query, 0); *c; c++) checksum = checksum * 31 + *c;
            checksum = checksum * 31 + (unsigned long)sqlite3_column_int64(query, 1);
        }
        sqlite3_finalize(query);
        if (sqlite3_exec(db, "SELECT * FROM nowhere", NULL, NULL, NULL) != SQLITE_ERROR) return 1;
        printf("%d groups, checksum %lx, %s\n", groups, checksum, sqlite3_errmsg(db));
        sqlite3_close(db);
        return (int)(checksum % 100);
    }
    "#;

/// SQLite inserts 100,000 rows in a transaction, joins, groups and prints a checksum.
#[test]
fn sqlite() {
    let sources = package("libsqlite3-sys").join("sqlite3");
    let dir = TempDir::new().unwrap();
    let include = format!("-I{}", sources.display());
    let library = dir.path().join("sqlite3.o");
    tool(Command::new("cc").args(["-c", "-O2", "-fPIC", "-o"]).arg(&library).arg(sources.join("sqlite3.c")));
    let driver = compile(dir.path(), "driver.c", SQLITE_DRIVER, &["-O2", "-fPIC", &include]);
    let expected = same_as_native(&[driver, library], &["-lm"], &["100000"]);
    assert!(expected.stdout.contains("97 groups") && expected.stdout.contains("no such table"), "{expected:?}");
}

const LUA_SCRIPT: &str = r#"
    local function counter(step)
        local n = 0
        return function() n = n + step; return n end
    end
    local by_two = counter(2); by_two()
    print("closure", by_two())
    for word, count in string.gmatch("one=1, two=22, three=333", "(%a+)=(%d+)") do
        io.write(word, ":", #count, " ")
    end
    print(string.format("%q", ("hello world"):gsub("o", "0")))
    local co = coroutine.wrap(function(a)
        for i = 1, 3 do a = a + coroutine.yield(a * i) end
        return "done"
    end)
    print(co(10), co(1), co(2), co(3))
    print(select(2, pcall(function() error({code = 7}) end)).code)
    print(select(2, pcall(error, "plain")), select(2, pcall(function() return nil + 1 end)))
    local function deep(n) return n == 0 and 0 or 1 + deep(n - 1) end
    print(deep(10000), (select(2, pcall(function() local function f() return 1 + f() end return f() end)):match("stack overflow")))
    local t = setmetatable({}, {__index = function(_, k) return k * k end, __gc = function() print("collected") end})
    print(t[12], math.floor(math.sin(1) * 1e6), #arg, arg[1])
    table.sort(arg); collectgarbage()
    os.exit(11, true)
    "#;

/// The interpreter's main function: the package has the library only.
const LUA_DRIVER: &str = r#"
    #include "lauxlib.h"
    #include "lua.h"
    #include "lualib.h"
    #include <stdio.h>
    int main(int argc, char **argv) {
        lua_State *L = luaL_newstate();
        luaL_openlibs(L);
        lua_newtable(L);
        for (int i = 2; i < argc; i++) {
            lua_pushstring(L, argv[i]);
            lua_rawseti(L, -2, i - 1);
        }
        lua_setglobal(L, "arg");
        if (argc < 2 || luaL_dofile(L, argv[1])) {
            fprintf(stderr, "%s\n", argc < 2 ? "no script" : lua_tostring(L, -1));
            return 1;
        }
        lua_close(L);
        return 0;
    }
    "#;

/// The Lua interpreter runs a script with closures, patterns, coroutines, error handling and deep recursion.
#[test]
fn lua() {
    let sources = lua_54(&package("lua-src"));
    let dir = TempDir::new().unwrap();
    let mut objects = Vec::new();
    for entry in fs::read_dir(&sources).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_some_and(|extension| extension == "c") && !matches!(stem.as_str(), "lua" | "luac") {
            let object = dir.path().join(format!("{stem}.o"));
            let mut cc = Command::new("cc");
            tool(cc.args(["-c", "-O2", "-fPIC", "-DLUA_USE_POSIX", "-o"]).arg(&object).arg(&path));
            objects.push(object);
        }
    }
    objects.sort();
    let include = format!("-I{}", sources.display());
    objects.push(compile(dir.path(), "driver.c", LUA_DRIVER, &["-O2", "-fPIC", &include]));
    let script = dir.path().join("script.lua");
    fs::write(&script, LUA_SCRIPT).unwrap();
    let expected = same_as_native(&objects, &["-lm"], &[script.to_str().unwrap(), "b", "a"]);
    assert_eq!(expected.code, Some(11), "{expected:?}");
    assert!(expected.stdout.contains("stack overflow") && expected.stdout.contains("collected"), "{expected:?}");
}

/// Returns the folder of Lua 5.4 among the versions that the package has.
fn lua_54(package: &Path) -> PathBuf {
    let folders = fs::read_dir(package).unwrap().map(|entry| entry.unwrap().path());
    let is_54 = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("lua-5.4");
    folders.filter(is_54).max().expect("the package has Lua 5.4")
}

const DEFLATE: &str = r#"
    #include <stdio.h>
    #include <string.h>
    #include <zlib.h>
    int main(void) {
        static unsigned char text[100000], packed[110000], back[100000];
        for (unsigned i = 0; i < sizeof text; i++) text[i] = "farlink"[i * i % 7];
        uLongf packed_bytes = sizeof packed, back_bytes = sizeof back;
        if (compress2(packed, &packed_bytes, text, sizeof text, 9) != Z_OK) return 1;
        if (uncompress(back, &back_bytes, packed, packed_bytes) != Z_OK) return 2;
        printf("%s %lu %lu %d %lx\n", zlibVersion(), packed_bytes, back_bytes, memcmp(text, back, back_bytes),
               crc32(0, back, back_bytes));
        return 0;
    }
    "#;

const PNG: &str = r#"
    #include <png.h>
    #include <setjmp.h>
    #include <stdio.h>
    #include <stdlib.h>
    static size_t written;
    static void write_bytes(png_structp png, png_bytep bytes, size_t count) { written += count; }
    static void flush(png_structp png) {}
    int main(void) {
        png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
        png_infop info = png_create_info_struct(png);
        if (setjmp(png_jmpbuf(png))) { puts("bad image refused"); return 3; }
        png_set_write_fn(png, NULL, write_bytes, flush);
        png_set_IHDR(png, info, 64, 64, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                     PNG_FILTER_TYPE_DEFAULT);
        png_write_info(png, info);
        for (int y = 0; y < 64; y++) {
            png_byte row[64 * 3];
            for (int x = 0; x < 64 * 3; x++) row[x] = (png_byte)(x * y);
            png_write_row(png, row);
        }
        png_write_end(png, info);
        printf("%zu bytes\n", written);
        png_set_IHDR(png, info, 0, 0, 8, PNG_COLOR_TYPE_RGB, 0, 0, 0);
        return 0;
    }
    "#;

const LIBRARY_DIR: &str = "/usr/lib/x86_64-linux-gnu";

/// Runs `source` with static libraries of the system, and compares with the native build from the same archives.
fn with_archives(test: &str, source: &str, archives: &[&str], libraries: &[&str]) -> Option<common::Output> {
    let paths: Vec<PathBuf> = archives.iter().map(|name| Path::new(LIBRARY_DIR).join(name)).collect();
    if !paths.iter().all(|path| available(test, path)) {
        return None;
    }
    let dir = TempDir::new().unwrap();
    let mut inputs = vec![compile(dir.path(), "main.c", source, &["-O2", "-fPIC"])];
    inputs.extend(paths);
    Some(same_as_native(&inputs, libraries, &[]))
}

/// The system's static zlib compresses and decompresses.
#[test]
fn static_zlib() {
    if let Some(output) = with_archives("static_zlib", DEFLATE, &["libz.a"], &[]) {
        assert_eq!(output.code, Some(0));
    }
}

/// The system's static libpng, on static zlib, writes an image, and reports an error through `longjmp`.
#[test]
fn static_png() {
    if let Some(output) = with_archives("static_png", PNG, &["libpng16.a", "libz.a"], &["-lm"]) {
        assert_eq!(output.code, Some(3));
    }
}

const MATH: &str = r#"
    #include <stdio.h>
    double remquo(double, double, int *); double logb(double); long llround(double); double frexp(double, int *);
    int main(void) {
        volatile double x = 1234.567;
        int quotient, exponent;
        double rest = remquo(x, 7.25, &quotient), fraction = frexp(x, &exponent);
        printf("%.17g %d %g %ld %.17g %d\n", rest, quotient, logb(x), llround(x), fraction, exponent);
        return 0;
    }
    "#;

/// Members of the system's static math library whose relocations are supported give the values of the shared one.
#[test]
fn static_math() {
    let archive = fs::read_dir(LIBRARY_DIR).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let Some(archive) = { archive }.find(|name| name.starts_with("libm-") && name.ends_with(".a")) else {
        assert!(!available("static_math", Path::new(LIBRARY_DIR).join("libm-2.36.a")));
        return;
    };
    with_archives("static_math", MATH, &[&archive], &["-lm"]);
}

/// Vectorized calls of mathematical functions, which libm's linker script has a library of its own for.
#[test]
fn vector_math() {
    let dir = TempDir::new().unwrap();
    let source = "#include <math.h>\n#include <stdio.h>\n double a[256]; int main(void) { double sum = 0; \
                  for (int i = 0; i < 256; i++) a[i] = i * .01; for (int i = 0; i < 256; i++) a[i] = sin(a[i]); \
                  for (int i = 0; i < 256; i++) sum += a[i]; printf(\"%.6f\\n\", sum); return 0; }";
    let object = compile(dir.path(), "main.c", source, &["-O3", "-ffast-math", "-fPIC"]);
    assert!(tool(Command::new("nm").arg(&object)).contains("_ZGVbN2v_sin"));
    same_as_native(&[object], &["-lm"], &[]);
}

/// C++ with its runtime and its unwinder from static libraries.
#[test]
fn static_cxx() {
    let dir = TempDir::new().unwrap();
    let source = r#"
    #include <iostream>
    #include <future>
    #include <map>
    #include <regex>
    #include <stdexcept>
    int main() {
        std::map<std::string, int> map{{"a", 1}};
        try { map.at("b"); } catch (const std::out_of_range &error) { std::cout << error.what() << std::endl; }
        auto fails = std::async(std::launch::async, []() -> int { throw std::runtime_error("in a thread"); });
        try { fails.get(); } catch (const std::exception &error) { std::cout << error.what() << std::endl; }
        std::cout << std::regex_replace("foo bar", std::regex("o+"), "0") << std::endl;
        return map.size();
    }
    "#;
    let object = compile(dir.path(), "main.cc", source, &["-std=c++17", "-O1", "-fPIC"]);
    let native = native("c++", [&object], &["-static-libstdc++", "-static-libgcc", "-pthread"], &[], b"");
    assert_eq!((native.code, native.stdout.lines().count()), (Some(1), 3));
    for way in WAYS {
        let libraries = ["-l:libstdc++.a", "-l:libgcc_eh.a", "-lm"];
        let output = Farlink::new().arg("run").args(way).arg(&object).args(libraries).output();
        assert_eq!(output, native, "{way:?}");
    }
}

/// OpenSSL's static library: digests and ciphers, as its own tables choose them for this processor.
#[test]
fn static_crypto() {
    let source = r#"
    #include <openssl/evp.h>
    #include <stdio.h>
    static void show(const unsigned char *bytes, int count) {
        for (int i = 0; i < count; i++) printf("%02x", bytes[i]);
        puts("");
    }
    int main(void) {
        unsigned char out[64], key[32] = {1}, iv[16] = {2};
        unsigned count;
        int len, rest;
        EVP_Digest("hello", 5, out, &count, EVP_sha256(), NULL);
        show(out, count);
        EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
        EVP_EncryptInit_ex(context, EVP_aes_256_gcm(), NULL, key, iv);
        EVP_EncryptUpdate(context, out, &len, (const unsigned char *)"thirteen byte", 13);
        EVP_EncryptFinal_ex(context, out + len, &rest);
        show(out, len + rest);
        EVP_CIPHER_CTX_free(context);
        EVP_PKEY *pair = EVP_PKEY_Q_keygen(NULL, NULL, "EC", "P-256");
        printf("%d\n", EVP_PKEY_get_bits(pair));
        EVP_PKEY_free(pair);
        // Executors of LLVM may end without it.
        fflush(stdout);
        return 11;
    }
    "#;
    let output = with_archives("static_crypto", source, &["libcrypto.a"], &["-ldl"]);
    assert!(output.is_none_or(|output| output.code == Some(11)));
}
