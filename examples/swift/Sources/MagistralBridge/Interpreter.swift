import Foundation

#if canImport(Darwin)
import Darwin
#elseif canImport(Glibc)
import Glibc
#endif

/// The places of Python and of the package, for instance in an app's bundle.
public struct PythonLocation: Sendable {
    /// libpython: `Python.framework/Versions/3.13/Python`, `libpython3.13.dylib`.
    public let library: String
    /// The folder that has `lib/python3.13`; nil if libpython finds it by itself.
    public let home: String?
    /// The folder that has `magistral_mlx` and its dependencies.
    public let sitePackages: String

    public init(library: String, home: String?, sitePackages: String) {
        self.library = library
        self.home = home
        self.sitePackages = sitePackages
    }
}

/// A failure between Swift and the bridge, such as a missing library or module.
public struct PythonError: Error, CustomStringConvertible {
    public let description: String
}

/// The Python interpreter: calls functions of the bridge with JSON and returns JSON.
///
/// Every result is checked, so that nothing traps. No reference leaves this file. Use it on the thread
/// that made it, as MagistralBridge's executor does.
final class Interpreter {
    private typealias Object = UnsafeMutableRawPointer

    private let python: Functions
    private let bridge: Object
    private let loads: Object
    private let dumps: Object

    init(_ location: PythonLocation) throws {
        if let home = location.home { setenv("PYTHONHOME", home, 1) }
        setenv("PYTHONDONTWRITEBYTECODE", "1", 1)  // a signed bundle must not change
        setenv("PYTHONNOUSERSITE", "1", 1)
        python = try Functions(location.library)
        python.initialize()
        // As bytes, so that no character of a path can be code.
        let path = location.sitePackages.utf8.map { "\\x" + String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }
        let setUp = """
            import os, site, sys
            sys.argv = [""]
            site.addsitedir(os.fsdecode(b'\(path.joined())'))
            """
        guard python.run(setUp) == 0 else {
            throw PythonError(description: "Python could not be set up; is \(location.home ?? "its home") complete?")
        }
        bridge = try Self.module("magistral_mlx.bridge", python)
        let json = try Self.module("json", python)
        loads = try Self.attribute("loads", json, python)
        dumps = try Self.attribute("dumps", json, python)
    }

    /// Call a function of the bridge with the entries of a JSON object and return its JSON.
    func call(_ function: String, _ arguments: Data) throws -> Data {
        let function = try Self.attribute(function, bridge, python)
        defer { python.release(function) }
        let text = arguments.withUnsafeBytes { bytes in
            python.text(bytes.bindMemory(to: CChar.self).baseAddress, bytes.count)
        }
        let keywords = try apply(loads, to: text)
        defer { python.release(keywords) }
        let none = try checked(python.tuple(0))
        defer { python.release(none) }
        let result = try checked(python.call(function, none, keywords))
        let written = try apply(dumps, to: result)
        defer { python.release(written) }
        var count = 0
        guard let bytes = python.bytes(written, &count) else { throw Self.error(python) }
        return Data(bytes: bytes, count: count)
    }

    /// Call `function(argument)`; takes over the reference to the argument.
    private func apply(_ function: Object, to argument: Object?) throws -> Object {
        let arguments = try checked(python.tuple(1))
        defer { python.release(arguments) }
        guard python.setItem(arguments, 0, try checked(argument)) == 0 else { throw Self.error(python) }
        return try checked(python.call(function, arguments, nil))
    }

    private func checked(_ object: Object?) throws -> Object {
        guard let object else { throw Self.error(python) }
        return object
    }

    private static func module(_ name: String, _ python: Functions) throws -> Object {
        guard let module = python.importModule(name) else { throw error(python) }
        return module
    }

    private static func attribute(_ name: String, _ object: Object, _ python: Functions) throws -> Object {
        guard let attribute = python.attribute(object, name) else { throw error(python) }
        return attribute
    }

    /// Return Python's pending exception and clear it.
    private static func error(_ python: Functions) -> PythonError {
        var type: Object?
        var value: Object?
        var trace: Object?
        python.fetch(&type, &value, &trace)
        defer { [type, value, trace].forEach { if let object = $0 { python.release(object) } } }
        var count = 0
        guard let object = value ?? type, let text = python.string(object), let bytes = python.bytes(text, &count) else {
            return PythonError(description: "Python failed without saying why")
        }
        defer { python.release(text) }
        return PythonError(description: String(decoding: UnsafeRawBufferPointer(start: bytes, count: count), as: UTF8.self))
    }

    /// The functions of Python's C interface that this file uses, found by name.
    private struct Functions {
        let initialize: @convention(c) () -> Void
        let run: @convention(c) (UnsafePointer<CChar>) -> CInt
        let importModule: @convention(c) (UnsafePointer<CChar>) -> Object?
        let attribute: @convention(c) (Object, UnsafePointer<CChar>) -> Object?
        let call: @convention(c) (Object, Object, Object?) -> Object?
        let tuple: @convention(c) (Int) -> Object?
        let setItem: @convention(c) (Object, Int, Object) -> CInt
        let text: @convention(c) (UnsafePointer<CChar>?, Int) -> Object?
        let bytes: @convention(c) (Object, UnsafeMutablePointer<Int>) -> UnsafePointer<CChar>?
        let string: @convention(c) (Object) -> Object?
        let fetch:
            @convention(c) (
                UnsafeMutablePointer<Object?>, UnsafeMutablePointer<Object?>, UnsafeMutablePointer<Object?>
            ) -> Void
        let release: @convention(c) (Object) -> Void

        init(_ path: String) throws {
            guard let library = dlopen(path, RTLD_NOW | RTLD_GLOBAL) else {
                throw PythonError(description: "\(path) cannot be loaded: \(dlerror().map { String(cString: $0) } ?? "")")
            }
            func find<Function>(_ name: String) throws -> Function {
                guard let symbol = dlsym(library, name) else {
                    throw PythonError(description: "\(path) has no \(name); it is no libpython")
                }
                return unsafeBitCast(symbol, to: Function.self)
            }
            initialize = try find("Py_Initialize")
            run = try find("PyRun_SimpleString")
            importModule = try find("PyImport_ImportModule")
            attribute = try find("PyObject_GetAttrString")
            call = try find("PyObject_Call")
            tuple = try find("PyTuple_New")
            setItem = try find("PyTuple_SetItem")
            text = try find("PyUnicode_FromStringAndSize")
            bytes = try find("PyUnicode_AsUTF8AndSize")
            string = try find("PyObject_Str")
            fetch = try find("PyErr_Fetch")
            release = try find("Py_DecRef")
        }
    }
}
